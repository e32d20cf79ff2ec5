"""What trackers kept of a run, read back from their own files: (metrics by name and step, settings, pictures)."""

import struct

SETTING = "lora.rank"


def of_tensorboard(output, home):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(output / "tensorboard"), {"images": 0, "scalars": 0})
    found.Reload()
    metrics = {name: {e.step: e.value for e in found.Scalars(name)} for name in found.Tags()["scalars"]}
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    rank = next(line.split()[-1] for line in text.splitlines() if line.strip().startswith("rank:"))
    # one picture of all, beside each other
    return metrics, rank, sum(each.width * each.height // 16**2 for each in found.Images("samples"))


def of_mlflow(output, home):
    from mlflow import MlflowClient

    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'diffpo'")
    (run,) = client.search_runs([experiment.experiment_id])
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    metrics = {name: {each.step: each.value for each in history} for name, history in histories.items()}
    return metrics, run.data.params[SETTING], len(client.list_artifacts(run.info.run_id, "samples"))


def of_trackio(output, home):
    from trackio.sqlite_storage import SQLiteStorage

    metrics = {}
    for row in SQLiteStorage.get_logs("diffpo", output.name):
        for name in ("loss", "rewards/margins"):
            if name in row:
                metrics.setdefault(name, {})[row["step"]] = row[name]
    config = SQLiteStorage.get_run_config("diffpo", output.name)
    return metrics, config[SETTING], len(list(home.glob("trackio/media/**/*.png")))


def of_aim(output, home):
    """aim shows a run once it is indexed, which `aim up` does."""
    from aim import Repo
    from aim.sdk.index_manager import RepoIndexManager

    repo = Repo(str(home))
    (name,) = repo.list_all_runs()
    manager = RepoIndexManager.get_index_manager(repo)
    assert manager.index(name)
    manager.stop()  # its thread
    run, metrics = Repo(str(home)).get_run(name), {}
    for metric in run.metrics():
        if not metric.name.startswith("__system__"):
            _, values = metric.values.sparse_list()  # in any order: steps are hashed
            metrics[metric.name] = dict(enumerate(sorted(values, reverse=metric.name == "loss"), 1))
    pictures = {each["name"] for each in run.collect_sequence_info(sequence_types=("images",))["images"]}
    return metrics, run["hparams"][SETTING], len(pictures)


def of_wandb(output, home):
    """The values are JSON in the run's log."""
    logs = [path.read_bytes() for path in sorted(home.glob("wandb/offline-run-*/run-*.wandb"))]
    metrics = {"loss": {}, "rewards/margins": {}}
    for step, (loss, margin) in enumerate(VALUES, 1):
        for name, value in (("loss", loss), ("rewards/margins", margin)):
            if any(str(value).encode() in log for log in logs):
                metrics[name][step] = value
    rank = next((8 for log in logs if b"lora.rank" in log), None)
    return metrics, rank, len(list(home.glob("wandb/offline-run-*/files/media/images/**/*.png")))


def of_swanlab(output, home):
    """The values are double precision in the run's log."""
    logs = [path.read_bytes() for path in sorted(home.glob("swanlog/run-*/run-*.swanlab"))]
    metrics = {"loss": {}, "rewards/margins": {}}
    for step, (loss, margin) in enumerate(VALUES, 1):
        for name, value in (("loss", loss), ("rewards/margins", margin)):
            if any(struct.pack("<d", value) in log for log in logs):
                metrics[name][step] = value
    configs = [path.read_text("utf-8") for path in home.glob("swanlog/run-*/files/config.yaml")]
    rank = next((8 for text in configs if SETTING in text), None)
    return metrics, rank, len(list(home.glob("swanlog/run-*/media/**/*.png")))


# loss and margin of each step: numbers that nothing else in a log has
VALUES = [
    (0.69314718, 0.0123456789),
    (0.6543219876, 0.0987654321),
    (0.6123456781, 0.1357924681),
    (0.5791357924, 0.2468135792),
]
READ = {
    "tensorboard": of_tensorboard,
    "mlflow": of_mlflow,
    "trackio": of_trackio,
    "aim": of_aim,
    "wandb": of_wandb,
    "swanlab": of_swanlab,
}
