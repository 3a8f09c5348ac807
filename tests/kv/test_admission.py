"""Places for searches in memory."""

from tts_engine.kv.admission import Admission


def test_a_search_is_expected_to_come_to_what_others_of_its_kind_came_to():
    admission = Admission()
    assert admission.expected("beam", (100, 300)) == [100, 300]
    for num_bytes in ([30, 70], [50, 0]):
        admission.note("beam", num_bytes)
    assert admission.expected("beam", (100, 300)) == [40, 35] and admission.expected("beam", (35, 36)) == [35, 35]
    assert admission.expected("dvts", (100, 0)) == [100, 0]
