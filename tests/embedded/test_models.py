"""The models that ship: what they weigh, that their figures hold, and that their README is the one the figures make."""

import json

import pytest

from tts_engine.embedded import MODELS, NAMES, model_path
from tts_engine.embedded.check import Figure, check, readme
from tts_engine.embedded.recipe import POLICIES, PRMS
from tts_engine.errors import ModelError


def test_every_model_ships_as_ordinary_files_of_25_megabytes_together():
    files = [path for name in NAMES for path in model_path(name).iterdir()]
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors"}
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert all((model_path(name) / file).is_file() for name in NAMES)
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert set(NAMES) == {*POLICIES, *PRMS}


def test_an_unknown_name_is_one_sentence_with_the_known_ones():
    with pytest.raises(ModelError, match="no embedded model 'policy-xl'; known: policy-s"):
        model_path("policy-xl")


@pytest.mark.timeout(1800)
def test_the_models_are_what_their_figures_say(soak):
    figures = check(min(600, 60 * soak), log=lambda line: None)
    assert figures.keys() == json.loads((MODELS / "figures.json").read_text())["figures"].keys()


def test_the_readme_is_made_from_the_figures():
    record = json.loads((MODELS / "figures.json").read_text())
    figures = {name: Figure(**figure) for name, figure in record["figures"].items()}
    assert (MODELS / "README.md").read_text() == readme(figures, record["problems"], MODELS)
