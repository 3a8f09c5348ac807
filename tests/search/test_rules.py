import pytest

from tts_engine.search import PAPER, PRESETS, REFERENCE, SAL, MethodError, Rules, make_rules


def test_the_presets_are_the_table_of_the_three_readings():
    assert Rules() == PAPER
    rows = {
        name: (r.finished, r.voted, r.drop_duplicates, r.drop_truncated, r.selects_by, r.temperature, r.grouping)
        for name, r in PRESETS.items()
    }
    assert rows == {
        "paper": ("compete", "finished", False, False, "last", 0.7, "exact"),
        "reference": ("hold", "survivors", True, True, "last", 0.7, "exact"),
        "sal": ("refill", "n", False, False, "last", 0.8, "canonical"),
    }


def test_a_preset_may_be_changed_setting_by_setting():
    assert make_rules("sal", temperature=0.6) == make_rules(SAL, temperature=0.6)
    assert make_rules("sal", temperature=0.6).finished == "refill"
    assert make_rules("reference") == REFERENCE


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"finished": "win"}, "no rule finished='win'; known: compete, hold, refill"),
        ({"selects_by": "prod"}, "no rule selects_by='prod'; known: last, min, mean"),
        ({"drop_duplicates": "yes"}, "no rule drop_duplicates='yes'; known: True, False"),
        ({"temperature": -1}, "temperature must be a number of at least 0, not -1"),
        ({"temperature": float("nan")}, "temperature must be a number of at least 0, not nan"),
        ({"tempature": 0.5}, "no rule 'tempature'; known: finished, "),
    ],
    ids=["finished", "selects_by", "bool", "temperature", "nan", "unknown"],
)
def test_a_bad_rule_is_refused_in_one_sentence(change, sentence):
    with pytest.raises(MethodError) as error:
        make_rules("paper", **change)
    assert str(error.value).startswith(sentence)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(MethodError, match=r"^no rules 'its_hub'; known: paper, reference, sal$"):
        make_rules("its_hub")
