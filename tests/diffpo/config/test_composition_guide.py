"""docs/composition.md: its examples are accepted, and what it lists as refused is refused with that reason."""

import re

import paper_index
import pytest
import yaml
from pydantic import ValidationError

from diffpo.config import ObjectiveSettings

GUIDE = (paper_index.PAGE.parent / "composition.md").read_text(encoding="utf-8")
EXAMPLES = [yaml.safe_load(block)["objective"] for block in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)]
REFUSED = re.findall(r"^\| `(\{name.*?\})` \| (.+?) \|$", GUIDE, re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["name"])
def test_the_guides_examples_are_accepted(example):
    found = ObjectiveSettings.model_validate(example)
    assert all(getattr(found, key) == value for key, value in example.items() if not isinstance(value, dict))


@pytest.mark.parametrize(("composition", "reason"), REFUSED)
def test_what_the_guide_calls_refused_is_refused_for_that_reason(composition, reason):
    with pytest.raises(ValidationError, match=re.escape(reason)):
        ObjectiveSettings.model_validate(yaml.safe_load(composition))


def test_the_guide_names_every_key():
    assert EXAMPLES and REFUSED
    keys = set(ObjectiveSettings.model_fields) - {"name", "forward", "inversion", "rollout", "direct"}
    assert all(f"`{key}`" in GUIDE for key in keys)


def test_options_of_the_presets_solver_do_not_stay_with_another_solver():
    def options(**rollout):
        given = {"name": "flow_grpo", "rollout": {"scorers": ["pickscore"], **rollout}}
        return ObjectiveSettings.model_validate(given).rollout.step_options

    assert options() == options(step="flow_sde") == {"amount": 0.7}
    assert options(step="ddim") == {} and options(step="dpmpp", step_options={"eta": 1}) == {"eta": 1}


def test_options_of_the_presets_link_do_not_stay_with_another_link():
    own = ObjectiveSettings.model_validate({"name": "dpop", "link": "exo"})
    assert (own.link, own.link_options) == ("exo", {})
    assert ObjectiveSettings.model_validate({"name": "dpop", "link": "dpop"}).link_options == {"weight": 50}
