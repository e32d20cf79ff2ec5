"""Training of a published method for two updates on a tiny model."""

import pytest
from tiny import metrics_of, picture, png, write_parquet

from diffpo import links, methods
from diffpo.config import ObjectiveSettings
from diffpo.train.loop import train
from diffpo.weights import lora_file

CAPTIONS = ("a red circle on a white background", "two blue squares on a black background")
ON_POLICY = (
    "objective.rollout.prompts=2",
    "objective.rollout.samples=2",
    "objective.rollout.steps=3",
    "objective.rollout.transitions=null",
    "objective.rollout.guidance=2.0",
)
POOL = (
    "objective.rollout.step_scorer=shapes.total",
    "objective.rollout.start=0",
    "objective.rollout.pool=2",
    "objective.rollout.threshold=0",
)
JUDGED = {
    "pool": POOL,
    "reward": ("objective.rollout.scorers=[on_policy:Redness]", "objective.direct.calls=2"),
    "samples": ("objective.rollout.scorers=[shapes.total]",),
    "trajectory": ("objective.rollout.scorers=[shapes.total]",),
}
# methods whose first loss compares errors, not rewards, or that know no reference
FREE = {name for name in methods.names() if methods.load(name).settings.get("reference", {}).get("policy") == "none"}


def write_data(folder, captions=CAPTIONS):
    """Pairs with scores, captions of their own and users; lists with scores; the captions as prompts."""
    pairs = [
        {
            "caption": captions[i % 2],
            "jpg_0": png(picture(2 * i)),
            "jpg_1": png(picture(2 * i + 1)),
            "label_0": float(i % 2 == 0),
            "label_1": float(i % 2 == 1),
            "score_0": 0.5 + 0.1 * (i % 2 == 0),
            "score_1": 0.5 + 0.1 * (i % 2 == 1),
            "size_0": float(i),
            "size_1": 2.0,
            "user_id": f"user {i // 2}",
        }
        for i in range(6)
    ]
    lists = [
        {"prompt": captions[i % 2], "images": [png(picture(3 * i + k)) for k in range(3)], "scores": [0.1, 0.7, 0.4]}
        for i in range(4)
    ]
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(captions) + "\n")
    return {
        "pairs": write_parquet(folder / "pairs.parquet", pairs),
        "lists": write_parquet(folder / "lists.parquet", lists),
        "prompts": prompts,
    }


def run(name, model, make_config, data, *more):
    """Train ``name`` on ``model`` for two updates: it starts where policy and reference agree, and it moves."""
    source = methods.load(name).settings.get("source", "forward")
    judge = {"pool": {"step_scorer": "shapes.total"}}.get(source, {"scorers": ["shapes.total"]})
    given = {"name": name, "beta": 500, **({"rollout": judge} if source in JUDGED else {})}
    settings = ObjectiveSettings.model_validate(given)
    overrides = [f"objective.name={name}", "objective.beta=500", "train.steps=2", "train.lr=1e-3", "data.list_size=3"]
    if settings.on_policy:
        overrides += [f"data.prompts={data['prompts']}", *ON_POLICY, *JUDGED.get(source, ())]
        overrides += [] if settings.source == "self_play" else ["data.train=null"]
        overrides += [] if settings.rollout.window is None else ["objective.rollout.window=1"]
    if settings.users:
        overrides += ["data.columns.user=user_id"]
    if settings.steered:
        overrides += ["data.columns.rewards=[score, size]"]
    kind = links.kind(settings.link)
    config = make_config(model, *overrides, *more, data=data["lists" if kind == "list" else "pairs"])
    train(config)
    first, second = metrics_of(config.output)
    assert first["grad_norm"] > 0
    if source == "reward":
        assert first["loss"] == pytest.approx(-settings.link_weight * first["rollout/score"]) != second["loss"]
    else:
        assert second["calls/backward"] == 2 * first["calls/backward"]
    if source == "reward":
        pass
    elif name in FREE:
        assert first["rewards/chosen"] < 0  # -(beta/2) err
    else:
        assert first["rewards/chosen"] == first["error/chosen_delta"] == 0.0
        assert second["error/chosen_delta"] != 0.0
    weights, about = lora_file.read_lora(config.output)
    assert about["objective"] == name and any(
        value.abs().sum() > 0 for key, value in weights.items() if "lora_B" in key
    )
    return config
