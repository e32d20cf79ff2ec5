"""Saved plans: every solver's comes back the same, and whatever else a file holds is refused in one sentence."""

import dataclasses
import json
import os
import re
import struct

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from samplers import EDM, Grid, Plan, RectifiedFlow, VPDiscrete, VPLinear, build_plan, then_denoise, without_first_call
from samplers.plan import row
from samplers.schedule import training_betas
from samplers.solvers import SOLVERS
from samplers.stochastic import LangevinPlan
from samplers.tail import tail

SD = VPDiscrete.scaled_linear()
NO_TABLE = ("predictor_corrector", "evodiff")  # their coefficients depend on the state
PLANS = {
    **{solver: lambda s=solver: build_plan(SD, s, 12) for solver in SOLVERS if solver not in NO_TABLE},
    **{
        f"{solver} flow": lambda s=solver: build_plan(RectifiedFlow(3.0), s, 9, prediction="flow")
        for solver in ("ddim", "dpmpp", "unipc", "sa_solver", "abm", "lms", "pndm", "heun", "dpm2", "singlestep")
    },
    "the rule": lambda: build_plan(SD, None, 10, guidance=7.5),
    "annealed Langevin": lambda: build_plan(SD, "predictor_corrector", 12, corrector="ald"),
    "pece": lambda: build_plan(SD, "sa_solver", 13, pece=True, tau=1.0, mode="few_steps"),
    "churn": lambda: build_plan(EDM(), "heun", 12, "karras", s_churn=40.0, s_tmin=0.05, s_tmax=50.0),
    "stages that go up": lambda: build_plan(VPLinear(), "runge_kutta", 12, "time", end="t_end", method="ssp3"),
    "towards noise": lambda: build_plan(SD, "ddim", 8, t_start=0.1, t_end=1.0, end="t_end"),
    "from the middle": lambda: tail(build_plan(SD, "lms", 9), 4),
    "one free call": lambda: without_first_call(build_plan(SD, "ipndm", 6)),
    "denoised": lambda: then_denoise(build_plan(SD, "dpmpp", 6, end="t_end"), SD),
    "zero terminal SNR": lambda: build_plan(
        VPDiscrete(training_betas("linear", zero_snr=True)), "ddim", 6, prediction="v_prediction"
    ),
}


@pytest.mark.parametrize("make", PLANS.values(), ids=list(PLANS))
def test_every_solver_comes_back_the_same(make, z, tmp_path):
    plan = make()
    plan.save(tmp_path / "plan.safetensors")
    again = Plan.load(tmp_path / "plan.safetensors")
    assert (again.name, again.prediction) == (plan.name, plan.prediction)
    for name in ("t", "alpha", "sigma", "label", "rows", "reads", "start"):
        assert np.array_equal(getattr(plan, name), getattr(again, name)), name
    noise = torch.randn(1 + len(plan), *z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    runs = [p.run(lambda x, t: torch.tanh(x + 1e-3 * t), z, noise=lambda k: noise[k]) for p in (plan, again)]
    assert torch.equal(*runs) and torch.isfinite(runs[0]).all()
    assert os.listdir(tmp_path) == ["plan.safetensors"]


def test_langevin_is_not_a_table(tmp_path):
    with pytest.raises(ValueError, match="predictor_corrector"):
        build_plan(SD, "predictor_corrector", 12).save(tmp_path / "x")
    assert not os.listdir(tmp_path)
    build_plan(SD, "ddim", 3).save(tmp_path / "x")
    assert type(LangevinPlan.load(tmp_path / "x")) is Plan


ARRAYS = {  # four calls of two stages each
    name: getattr(build_plan(SD, "heun", 4, end="t_end"), name)
    for name in ("t", "alpha", "sigma", "label", "rows", "reads", "start")
}
ABOUT = {"version": 1, "name": "x", "prediction": "epsilon"}


def put(path, about=ABOUT, **changed):
    arrays = {name: np.ascontiguousarray(a) for name, a in {**ARRAYS, **changed}.items() if a is not None}
    save_file(arrays, path, metadata={"samplers_plan": about if isinstance(about, str) else json.dumps(about)})
    return path


def test_the_unchanged_file_is_a_plan(tmp_path):
    assert len(Plan.load(put(tmp_path / "x"))) == 4


def at(name, index, value):
    changed = ARRAYS[name].copy()
    changed[index] = value
    return {name: changed}


def wider(name, value):
    """An array with one more column, of a value that no call uses."""
    return {name: np.concatenate([ARRAYS[name], np.full_like(ARRAYS[name][..., :1], value)], -1)}


NAN, INF = float("nan"), float("inf")
TABLES = {
    **{f"{name} {value}": at(name, -1, value) for name in ARRAYS for value in (NAN, INF, -INF, 1e308, -1e39)},
    **{f"{name} missing": {name: None} for name in ARRAYS},
    **{f"{name} {kind}": {name: ARRAYS[name].astype(kind)} for name in ARRAYS for kind in ("f4", "f2", "i8", "bool")},
    **{f"{name} 0-d": {name: ARRAYS[name].reshape(-1)[0]} for name in ARRAYS},
    **{f"{name} empty": {name: ARRAYS[name][:0]} for name in ARRAYS},
    **{f"{name} shorter": {name: ARRAYS[name][:-1]} for name in ARRAYS},
    **{f"{name} longer": {name: np.concatenate([ARRAYS[name], ARRAYS[name][-1:]])} for name in ARRAYS},
    **{f"{name} of one more dimension": {name: ARRAYS[name][None]} for name in ARRAYS},
    **{f"{name} reversed": {name: ARRAYS[name][::-1]} for name in ("t", "alpha", "sigma", "label")},
    **{f"negative {name}": at(name, 0, -0.5) for name in ("alpha", "sigma")},
    "another": {"another": np.zeros(3)},
    "no calls": {name: ARRAYS[name][:0] for name in ("label", "rows", "reads")}
    | {name: ARRAYS[name][:1] for name in ("t", "alpha", "sigma")},
    "rows without outputs": {"rows": ARRAYS["rows"][..., :3]},
    "rows of three": {"rows": np.repeat(ARRAYS["rows"][:, :1], 3, 1)},
    "rows of a sample without elements": {"rows": ARRAYS["rows"][..., None] * np.zeros(0)},
    "an output older than the first": {"rows": np.ones((4, 2, 8))},
    "NaN in a column that no call reaches": wider("rows", NAN),
    "start with more history than is kept": {"start": np.ones((9, 2))},
    "start of three columns": {"start": np.ones((2, 3))},
    "sigma = 0 at a call": at("sigma", 1, 0.0),
    "one level at two times": at("sigma", 2, ARRAYS["sigma"][0]) | at("alpha", 2, ARRAYS["alpha"][0]),
    "all turn round": {
        name: ARRAYS[name][[2, 1, 0, 3, 4][: len(ARRAYS[name])]] for name in ("t", "alpha", "sigma", "label")
    },
}
TABLES = {name: change for name, change in TABLES.items() if name not in ("start shorter", "start longer")} | {
    "start shorter": {"start": ARRAYS["start"][:1]}
}


@pytest.mark.parametrize("changed", TABLES.values(), ids=list(TABLES))
def test_tables_that_cannot_run(changed, tmp_path):
    with pytest.raises(ValueError, match=r"x\.plan': ") as caught:
        Plan.load(put(tmp_path / "x.plan", **changed))
    assert type(caught.value) is ValueError and len(str(caught.value)) < 1000


def test_code_makes_no_such_table_either():
    """Construction has the same check; only the number format is the file's own affair."""
    for changed in (TABLES[name] for name in TABLES if name != "all turn round"):  # image to image may begin so
        given = {**ARRAYS, **changed}
        if set(given) == set(ARRAYS) and all(a is not None and a.dtype == np.float64 for a in given.values()):
            with pytest.raises(ValueError, match="plan 'x'"):
                Plan("x", "epsilon", **given)
    with pytest.raises(ValueError, match="rows"):
        Plan("x", "epsilon", **{**ARRAYS, "rows": ARRAYS["rows"] + 1j})


HEADERS = [
    *("", "{", "[1]", "1", "null", '"x"', "{}", "[" * 50_000, '{"version": ' + "9" * 5000 + "}", " " * 10**6),
    *({**ABOUT, "version": v} for v in (0, 2, True, 1.0, "1", None, [1], {}, -1, 10**30)),
    *({**ABOUT, "name": v} for v in (None, 1, ["x"], {}, "a\nb", "\x1b[2J", "x" * 2000)),
    *({**ABOUT, "prediction": v} for v in (None, 1, ["epsilon"], {}, "banana", "Epsilon", "x" * 9000)),
    {"version": 1, "name": "x"},
    {**ABOUT, "more": 1},
]


@pytest.mark.parametrize("about", HEADERS, ids=[f"header{i}" for i in range(len(HEADERS))])
def test_headers_of_something_else(about, tmp_path):
    with pytest.raises(ValueError, match=r"x\.plan': ") as caught:
        Plan.load(put(tmp_path / "x.plan", about))
    assert type(caught.value) is ValueError and str(caught.value).isprintable() and len(str(caught.value)) < 1000


def header(text: bytes, length=None, data=b"") -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F64", shape=(4,), offsets=(0, 32)):
    return json.dumps({"t": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}).encode()


FILES = {
    "sigmas": b"",
    "short": b"\x00\x00\x00",
    "no header": bytes(64),
    "text": b"plan: 1\n" * 20,
    "pickle": b"\x80\x04\x95" + bytes(60),
    "a header longer than the file": header(b"{}", 2**40),
    "a header of 2^63": header(b"{}", 2**63),
    "deep": header(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "not JSON": header(b"{" + b"x" * 40),
    "not UTF-8": header(b'{"\xff\xfe": 1}'),
    "a huge shape": header(entry(shape=(2**40,), offsets=(0, 2**43))),
    "a shape that overflows": header(entry(shape=(2**62, 8), offsets=(0, 32)), data=bytes(32)),
    "a shape that lies": header(entry(shape=(40,)), data=bytes(32)),
    "offsets backwards": header(entry(offsets=(32, 0)), data=bytes(32)),
    "a negative shape": header(entry(shape=(-4,)), data=bytes(32)),
    "an unknown dtype": header(entry(dtype="C512"), data=bytes(32)),
    "no plan": header(entry(), data=bytes(32)),
}


@pytest.mark.parametrize("content", FILES.values(), ids=list(FILES))
def test_files_of_something_else(content, tmp_path):
    (tmp_path / "x.plan").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.plan': not a sampling plan") as caught:
        Plan.load(tmp_path / "x.plan")
    assert type(caught.value) is ValueError


def test_a_saved_plan_cut_anywhere(tmp_path):
    whole = put(tmp_path / "x").read_bytes()
    for length in range(0, len(whole), 41):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut"):
            Plan.load(tmp_path / "cut")


def test_places_that_are_no_files(tmp_path):
    """Nothing is opened that could wait for ever or never end."""
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)
    places = [tmp_path, tmp_path / "pipe", tmp_path / "huge", tmp_path / "missing", tmp_path / "a\0b", "", "/dev/zero"]
    for place in places:
        with pytest.raises(ValueError, match=re.escape(repr(os.fspath(place)))):
            Plan.load(place)
    (tmp_path / "link").symlink_to(put(tmp_path / "x"))
    assert len(Plan.load(str(tmp_path / "link"))) == 4


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    plan, path = build_plan(SD, "ddim", 3), tmp_path / "plan"
    plan.save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        build_plan(SD, "ddim", 9).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["plan"]
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            plan.save(place)
    with pytest.raises(FileNotFoundError):
        plan.save(tmp_path / "missing" / "plan")
    os.chmod(path, 0o640)
    (tmp_path / "link").symlink_to(path)
    build_plan(SD, "ddim", 5).save(tmp_path / "link")
    assert len(Plan.load(path)) == 5 and path.stat().st_mode & 0o777 == 0o640 and (tmp_path / "link").is_symlink()


def test_calls_and_results_that_are_not_there(z):
    plan = build_plan(SD, "dpmpp", 3)
    state = plan.begin(z)
    for k in (-1, 3):
        with pytest.raises(ValueError, match=f"{k}"):
            plan.step(k, state, z)
    with pytest.raises(ValueError, match="call 1"):
        plan.step(1, state, z)
    for shape in ((3,), (2, 2), (4, 1, 1, 2)):  # coefficients that vary over samples of another shape
        wide = {"rows": plan.rows.reshape(*plan.rows.shape, *(1 for _ in shape)) * np.ones(shape)}
        with pytest.raises(ValueError, match=r"rows.*\(1, 1, 2\)"):
            dataclasses.replace(plan, **wide).begin(z)
    steep = Plan.build("steep", "epsilon", Grid(SD).nodes(1), [row(1e30, 1e30)])
    with pytest.raises(FloatingPointError, match="steep"):
        steep.run(lambda x, t: x, 1e20 * z.float())


def test_epsilon_where_nothing_is_left_of_the_image(z):
    """x_0 = (x - sigma eps) / alpha with alpha = 2^-12: the network's errors come out 4096 times as large."""
    schedule = VPDiscrete(training_betas("scaled_linear", 0.00085, 0.012, zero_snr=True))
    plan = build_plan(schedule, "ddim", 4)
    with pytest.warns(UserWarning, match=r"alpha = 0.00024.*epsilon"):
        plan.run(lambda x, t: x, z)
    plan.run(lambda x, t: x, z, prediction="v_prediction")
    plan.run(lambda x, t: x, z, threshold=lambda x0: x0.clamp(-1, 1))
