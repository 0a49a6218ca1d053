"""Generation end to end in the interpreter: the embedded model's greedy text is the CPU plugin's."""

import pytest

from support.embedded_model import interpreted_texts


@pytest.mark.slow
def test_greedy_text_is_the_cpu_plugins():
    texts = interpreted_texts("cpu")
    assert all(texts)
    assert interpreted_texts("nvidia") == texts
