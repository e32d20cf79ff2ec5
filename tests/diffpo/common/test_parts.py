from diffpo.common.parts import Parts, file_key


def test_finished_work_of_all_processes_is_found_and_half_lines_are_not(tmp_path):
    for rank in (0, 1):
        Parts(tmp_path, "scores", rank).add(f"key {rank}", [rank, None])
    Parts(tmp_path, "others").add("key 0", "not this")
    with open(Parts(tmp_path, "scores", 1).path, "ab") as file:
        file.write(b'["key 2", {"a"')  # killed while it wrote
    again = Parts(tmp_path, "scores", 1)
    assert again.rows == {"key 0": [0, None], "key 1": [1, None]}
    again.add("key 3", "after")
    assert Parts(tmp_path, "scores").rows == {**again.rows} and len(again.rows) == 3


def test_a_changed_file_has_another_key(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"1")
    before = file_key(path, "prompt")
    assert file_key(path, "prompt") == before != file_key(path, "other")
    path.write_bytes(b"22")
    assert file_key(path, "prompt") != before
