"""Texts published with weights: notices and model cards."""

import yaml

from layerdecomp.modelcard import model_card, notice

METADATA = {
    "base_model": "a base",
    "base_sha256": "abc",
    "modified": "yes: LoRA added",
    "figures": '{"psnr": 20.123456, "psnr_stderr": 0.25}',
    "targets": "a|b",
}


def test_notices_state_the_modifications_and_the_licence() -> None:
    flux, own = notice(True, METADATA), notice(False, METADATA)
    for text in (flux, own):
        assert "modified: LoRA added" in text and "base_sha256: abc" in text
    assert "Black Forest Labs" in flux and "Non-Commercial License" in flux and "Apache" not in flux
    assert "Apache License, Version 2.0" in own and "Black Forest" not in own


def test_cards_have_readable_front_matter_figures_and_provenance() -> None:
    for flux, licence in ((True, "other"), (False, "apache-2.0")):
        card = model_card(flux, METADATA, {"adapter.safetensors": "the adapter"})
        front = yaml.safe_load(card.split("---")[1])
        assert front["license"] == licence and ("base_model" in front) == flux
        assert "| psnr | 20.12 \u00b1 0.25 |" in card and "psnr_stderr" not in card
        assert "| targets | `a\\|b` |" in card and "| adapter.safetensors | the adapter |" in card
        assert "not decompose" in card and "transformer=..., autoencoder=..." in card
    whole = model_card(False, {}, {"transformer.safetensors": "the base"})
    assert "None were measured." in whole and "transformer=..." not in whole
