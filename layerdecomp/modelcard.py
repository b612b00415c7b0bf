"""The texts that go with published weights: notice and model card."""

import json
from collections.abc import Mapping

FLUX = "FLUX.1 [dev] Non-Commercial License"
NOTICES = {
    True: f"""These weights are a derivative of FLUX.1 Fill [dev] and were modified: {{modified}}.

The FLUX.1 [dev] Model is licensed by Black Forest Labs, Inc. under the {FLUX}. Copyright Black Forest Labs, Inc.
IN NO EVENT SHALL BLACK FOREST LABS, INC. BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH USE OF THIS MODEL.

Whoever passes them on must pass on a copy of that licence, this notice, and the statement that they were modified.
""",
    False: """These weights derive from a base that layerdecomp trained from scratch, and were modified: {modified}.

Licensed under the Apache License, Version 2.0.
""",
}
FRONT_MATTER = {
    True: "license: other\nlicense_name: flux-1-dev-non-commercial-license\nlicense_link: LICENSE.md\n"
    "base_model: black-forest-labs/FLUX.1-Fill-dev\nbase_model_relation: adapter",
    False: "license: apache-2.0",
}


def notice(flux: bool, metadata: Mapping[str, str]) -> str:
    """The notice that the licence requires to accompany the weights, and the base they were made from.

    Args:
        flux: whether the base is FLUX.1-Fill-dev.
    """
    facts = "".join(f"{key}: {metadata[key]}\n" for key in ("base_model", "base_sha256") if key in metadata)
    return NOTICES[flux].format(modified=metadata.get("modified", "yes").removeprefix("yes: ")) + f"\n{facts}"


def model_card(flux: bool, metadata: Mapping[str, str], files: Mapping[str, str]) -> str:
    """README.md of a folder with an adapter, in the format of model hubs.

    Args:
        metadata: the adapter's.
        files: description of each file in the folder.
    """
    where = "" if "transformer" in " ".join(files) else ", transformer=..., autoencoder=..."
    return f"""---
{FRONT_MATTER[flux]}
library_name: layerdecomp
pipeline_tag: image-to-image
tags: [layer-decomposition, image-matting, inpainting, lora]
---

# Image layer decomposition

Splits an image, given a mask of one object, into a clean background (RGB) and the complete foreground (RGBA), after
[From Inpainting to Layer Decomposition](https://arxiv.org/abs/2511.20996).

    from layerdecomp.decomposer import Decomposer
    decomposer = Decomposer.from_pretrained("this folder"{where})
    decomposer.decompose("photo.jpg", "mask.png").save("layers", ["png", "ora"])

The frozen base is not part of an adapter: its files are looked for in this folder, then where layerdecomp is installed,
and must have the checksums below. A LoRA exported from this adapter for a stock inpainting pipeline inpaints, but
does not decompose.

| file | |
|---|---|
{_rows(files)}

## Figures

{_figures(metadata)}

## Provenance

| | |
|---|---|
{_rows({key: f"`{metadata[key]}`" for key in PROVENANCE if metadata.get(key)})}

## Licence

{FLUX + ", see LICENSE.md and NOTICE: a derivative, for non-commercial use." if flux else "Apache-2.0, see LICENSE."}
"""


PROVENANCE = (
    *("base_model", "base_sha256", "autoencoder_sha256", "rgba_autoencoder_sha256"),
    *(
        "rank",
        "alpha",
        "targets",
        "steps",
        "seed",
        "data",
        "train",
        "precision",
        "optim",
        "continues",
        "merged_from",
        "reduced",
        "commit",
        "date",
        "tool_version",
    ),
)


def _figures(metadata: Mapping[str, str]) -> str:
    figures = json.loads(metadata.get("figures", "{}"))
    if not figures:
        return "None were measured."
    errors = {name: f" \u00b1 {figures[key]:.2g}" for name in figures if (key := f"{name}_stderr") in figures}
    shown = {name: f"{value:.4g}{errors.get(name, '')}" for name, value in figures.items()}
    rows = _rows({name: text for name, text in shown.items() if not name.endswith("_stderr")})
    return f"On held-out samples at the end of training, \u00b1 standard error.\n\n| metric | |\n|---|---|\n{rows}"


def _rows(cells: Mapping[str, str]) -> str:
    return "\n".join(f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in cells.items())
