"""What transformers refuses to write of a generation config is dropped, and nothing else."""

import pytest
from transformers import GenerationConfig

from threadweaver.model.save import writable


@pytest.mark.parametrize(
    ("settings", "dropped"),
    [
        ({}, set()),
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, set()),
        ({"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}, {"temperature", "top_p"}),
        ({"early_stopping": True, "num_beams": 4}, set()),
        ({"early_stopping": True, "top_k": 5, "do_sample": True}, {"early_stopping"}),
        ({"output_scores": True, "max_length": 30}, {"output_scores"}),
        ({"use_cache": False, "cache_implementation": "static"}, {"cache_implementation"}),
        ({"pad_token_id": -1, "repetition_penalty": 1.1}, {"pad_token_id"}),
    ],
)
def test_only_refused_settings_are_dropped(settings, dropped, tmp_path):
    config = GenerationConfig(**settings)
    kept, refused = writable(config)
    assert refused == {name: settings[name] for name in dropped}
    kept.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    for name, value in settings.items():
        assert getattr(saved, name) == (None if name in dropped else value)


def test_settings_that_contradict_each_other_for_good_are_dropped_too(tmp_path):
    config = GenerationConfig()
    config.suppress_tokens, config.forced_eos_token_id, config.early_stopping = [3], 3, [1]
    kept, refused = writable(config)
    assert refused == {"suppress_tokens": [3], "early_stopping": [1]}
    kept.save_pretrained(tmp_path)
