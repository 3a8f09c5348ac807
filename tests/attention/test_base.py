import pytest

from tts_engine.attention import BACKENDS, make_backend, refuse_windows
from tts_engine.errors import EngineError


@pytest.mark.parametrize("name", ["native", "per_branch", "reference"])
def test_make_backend_knows_its_backends_by_name(name):
    assert make_backend(name).name == name


def test_an_unknown_backend_is_named_with_the_known_ones():
    with pytest.raises(EngineError, match=r"'flash'.*native, per_branch, reference, triton_blind, triton_tree"):
        make_backend("flash")


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_a_window_is_refused_by_name_by_backends_without_it(name):
    backend = make_backend(name, BACKENDS[name].devices[0])
    refuse_windows(backend, (None, None), "some/model")
    if backend.has_windows:
        refuse_windows(backend, (None, 4096), "some/model")
        return
    words = f"some/model .* sliding window of 4096 tokens, which attention backend '{name}' does not have: use reference"
    with pytest.raises(EngineError, match=words):
        refuse_windows(backend, (None, 4096), "some/model")


def test_a_backend_says_where_it_runs_and_whether_it_can_be_deterministic():
    with pytest.raises(EngineError, match="'native' runs on cpu only, not on cuda:1"):
        make_backend("native", "cuda:1")
    with pytest.raises(
        EngineError, match="'per_branch' is not batch-invariant; deterministic=True needs 'native' or 'reference' or 'triton_tree'"
    ):
        make_backend("per_branch", deterministic=True)
