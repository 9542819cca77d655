"""The table of the recipe's stages."""

import json

from experiments.embedded_model import summary


def test_a_stage_has_its_own_minutes_and_its_last_measurement(tmp_path):
    rows = [
        {"parameters": 10},
        {"stage": "bare", "step": 25, "kl": [1.0], "seconds": 60},
        {"stage": "bare", "step": 50, "posterior_kl": 0.9},
        {"stage": "bare", "step": 100, "kl": [0.5], "seconds": 600},
        {"stage": "bare", "step": 100, "posterior_kl": 0.5},
        {"name": "truth", "from": 0},
        {"stage": "truth", "step": 25, "kl": [0.1], "seconds": 780},
        {"stage": "truth", "step": 25, "posterior_kl": 0.1, "slots": [0.1, 0.2], "q_mse": 0.15}
        | {"correlations": [0.5, 0.25], "format_rate": 1.0},
    ]
    file = tmp_path / "log.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, _, bare, truth = summary.markdown(file).splitlines()
    assert bare == "| bare | 100 | 10 | 0.500 | – | – | – | – | – | – |"
    assert truth == (
        "| truth | 25 | 3 | 0.100 | 1.000 | – | – | 0.150 | 0.100 / 0.200 | 0.50 / 0.25 |"
    )
