"""Every key of the configs says what it means."""

import pytest

from diffpo.config import Config, ScorerConfig
from diffpo.config.reader import all_keys


@pytest.mark.parametrize("kind", [Config, ScorerConfig])
def test_every_key_has_a_description_and_every_section_a_docstring(kind):
    def fields(model, prefix=""):
        assert model.__doc__, model
        for name, field in model.model_fields.items():
            yield prefix + name, field
            for annotation in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if hasattr(annotation, "model_fields"):
                    yield from fields(annotation, f"{prefix}{name}.")

    found = dict(fields(kind))
    assert sorted(found) == sorted(all_keys(kind))
    assert [key for key, field in found.items() if not field.description] == []


def test_a_key_that_may_be_null_says_what_null_means():
    def missing(model):
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from missing(field.annotation)
            elif type(None) in getattr(field.annotation, "__args__", ()) and "null" not in field.description:
                yield f"{model.__name__}.{name}"

    assert [key for key in missing(Config) if not key.startswith("Columns.")] == []  # there the section says it
    assert list(missing(ScorerConfig.model_fields["scorer"].annotation)) == []
