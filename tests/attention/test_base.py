import pytest

from tts_engine.attention import make_backend
from tts_engine.errors import EngineError


@pytest.mark.parametrize("name", ["reference", "per_branch"])
def test_make_backend_knows_its_backends_by_name(name):
    assert make_backend(name).name == name


def test_an_unknown_backend_is_named_with_the_known_ones():
    with pytest.raises(EngineError, match=r"'flash'.*per_branch, reference"):
        make_backend("flash")
