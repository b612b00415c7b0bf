"""Configs: every file loads, and errors name the mistyped key and its source."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerdecomp.config import RESUMABLE, DecomposerJobConfig, changed_keys, load_config, save_config
from layerdecomp.errors import InputError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TINY = CONFIGS / "tiny.yaml"
JOBS = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem not in ("ablation", "curves", "mulan")]


def _written(folder: Path, text: str) -> Path:
    path = folder / "a.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_config_loads(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem and config.run_dir == f"runs/{path.stem}"


def test_arguments_override_the_file_and_the_file_overrides_the_defaults() -> None:
    config = load_config(TINY, ["optim.lr=3e-4", "train.steps=7", "lora.targets=[a.*, b]", "optim.betas=[0.5,0.6]"])
    assert isinstance(config, DecomposerJobConfig)
    assert (config.optim.lr, config.train.steps, config.lora.rank, config.flow.base_shift) == (3e-4, 7, 64, 0.5)
    assert config.lora.targets == ["a.*", "b"] and config.optim.betas == [0.5, 0.6]
    assert load_config(TINY, ["train.steps=7", "train.steps=8"]).train.steps == 8


def test_the_run_directory_follows_the_name() -> None:
    assert load_config(TINY, ["name=mine"]).run_dir == "runs/mine"
    assert load_config(TINY, ["name=mine", "run_dir=/x/${name}-2"]).run_dir == "/x/mine-2"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnak=3", "argument 'lora.rnak=3': unknown key lora.rnak; the nearest known one is lora.rank"),
        ("trian.steps=3", "unknown key trian.steps; the nearest known one is train.steps"),
        ("nmae=x", "unknown key nmae; the nearest known one is name"),
        ("model.depth=3", "unknown key model.depth"),
        ("train.steps=many", "argument 'train.steps=many': Value 'many' .* could not be converted to Integer"),
        (
            "optim.lr=fast",
            "argument 'optim.lr=fast': Value 'fast' .* could not be converted to Float; expected a number, such as",
        ),
        ("fusion.enabled=maybe", "argument 'fusion.enabled=maybe': .*; expected true or false"),
        ("lora.targets=all", "argument 'lora.targets=all': found 'all', expected a list: lora.targets=\\[all\\]"),
        ("optim.betas=0.9", "found 0.9, expected a list: optim.betas=\\[0.9\\]"),
        ("optim.betas={}", "argument 'optim.betas={}': found {}, expected a list: optim.betas=\\[\\]"),
        ("data.triplets.layered={}", "found {}, expected a list: data.triplets.layered=\\[\\]"),
        ("evaluate.published=[]", "argument 'evaluate.published=\\[\\]': Cannot merge"),
        ("train.steps=1e3", "expected a whole number, such as 7200$"),
        ("conditioning.cues=[depth]", "unknown key conditioning.cues; the nearest known one is fusion.cues"),
        ("zzz=3", "unknown key zzz; the known ones begin with adapter, adapter_base, compile, "),
        ("train.steps=", "argument 'train.steps='"),
        ("train=5", "argument 'train=5': train is a section; expected one of its keys: .*train.steps"),
        ("lora.targets=[*]", "argument .* an alias; expected .* quoted, such as \\['\\*_blocks.\\*'\\]"),
        ("lora.targets=[a", "argument 'lora.targets=\\[a'"),
        ("resume", "argument 'resume': expected key=value"),
        ("=3", "argument '=3': expected key=value"),
        ("optim.betas[0]=0.5", "optim.betas"),
        ("optim.betas=[0.9]", "optim.betas is \\[0.9\\]; expected two numbers"),
        ("optim={muon: true, weight_decay: 0.1}", "optim.weight_decay is 0.1"),
        ("name=${nobody}", "nobody"),
        ("optim.bits=4", "optim.bits is 4; expected 32 or 8"),
        ("optim.bits=8", "optim.bits is 8, which optim.muon does not support"),
        ("quantize=int4", "quantize is 'int4'; expected null, int8, fp8, nf4"),
        ("encode_batch_size=-1", "encode_batch_size is -1; expected at least 0"),
        ("train.steps=0", "train.steps is 0; expected at least 1"),
        ("train.devices=-1", "train.devices is -1; expected at least 1"),
        ("lora.rank=0", "lora.rank = 0"),
        ("data.source=mulan", "data.source is 'mulan'; expected scenes or triplets"),
        ("data.validation=0", "data.validation is 0; expected at least 1"),
        ("data.workers=-1", "data.workers is -1; expected at least 0"),
        ("data.scenes.size=100", "data.scenes.size: found 100, expected a positive multiple of 16"),
        ("evaluate.samples=0", "evaluate.samples is 0; expected at least 1"),
        ("evaluate.batch_size=0", "evaluate.batch_size is 0; expected at least 1"),
        ("sample.steps=0", "sample.steps is 0; expected at least 1"),
        ("sample.max_side=0", "sample.max_side is 0; expected at least 1"),
        ("seed=-1", "seed is -1; expected at least 0"),
        ("evaluate.seed=-1", "evaluate.seed is -1; expected at least 0"),
        ("train.strategy=dpp", "train.strategy is 'dpp'; expected auto or ddp"),
        ("optim.lr=-1", "optim.lr is -1.0; expected at least 0"),
        ("optim.clip=-1", "optim.clip is -1.0; expected at least 0"),
        ("optim.lr=.inf", "optim.lr is inf; expected a finite number"),
        (f"seed={2**64}", f"seed is {2**64}; expected less than 2\\^63"),
        (f"evaluate.seed={2**63}", f"evaluate.seed is {2**63}; expected less than 2\\^63"),
        ("optim.warmup=-5", "optim.warmup is -5"),
        ("optim.weight_decay=-0.1", "optim.weight_decay is -0.1"),
        ("optim.betas=[2,0.9]", r"optim.betas is \[2.0, 0.9\]; expected two numbers from 0 to less than 1"),
        ("flow.max_tokens=256", "flow.max_tokens is 256; expected at least 257"),
        ("flow.logit_std=-1", "flow.logit_std is -1.0; expected at least 0"),
        ("lora.alpha=0", "lora.alpha = 0, at which LoRA adds nothing"),
        *((f"{key}=nan", f"{key} is nan") for key in ("optim.lr", "optim.clip", "lora.alpha", "sample.guidance")),
        ("job=inpainter", "argument 'job=inpainter': .*tiny.yaml describes a decomposer job"),
    ],
)
def test_invalid_arguments_are_rejected_by_name(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(TINY, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("job: decomposer\nlora: {rnak: 3}", r"a\.yaml: unknown key lora.rnak; the nearest known one is lora.rank"),
        ("job: decomposer\nlora: 3", r"a\.yaml: lora is a section; expected one of its keys: .*lora.rank"),
        ("job: decomposer\nlora:", r"a\.yaml: lora is a section"),
        ("job: decomposer\nseed: {a: 3}", r"a\.yaml: unknown key seed.a; the nearest known one is seed"),
        ("job: decomposer\nlora: {rank: many}", r"a\.yaml: Value 'many'"),
        ("job: painter", r"a\.yaml: job is 'painter'; expected one of decomposer, autoencoder, inpainter"),
        ("name: x", r"a\.yaml: job is None; expected one of"),
        ("job: [decomposer]", r"a\.yaml: job is \['decomposer'\]; expected one of"),
        ("job: ${x}", r"a\.yaml"),
        ("", r"a\.yaml: job is None"),
        ("job: decomposer\nname: [1", r"a\.yaml is not readable YAML"),
        ("job: decomposer\njob: inpainter", r"a\.yaml is not readable YAML"),
        ("- 1\n- 2", r"a\.yaml: found a list"),
        ("7", r"a\.yaml"),
        ("job: inpainter\nmodel: {hidden_size: 100, num_heads: 3}", "hidden_size = 100 cannot be split"),
        ("job: autoencoder\nmodel: {ch: 20}", "norm_groups = 32 does not divide"),
    ],
)
def test_invalid_files_are_rejected_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(_written(tmp_path, text))


def test_missing_and_binary_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config .*absent.yaml does not exist; configs/ has"):
        load_config(tmp_path / "absent.yaml")
    path = tmp_path / "a.yaml"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="is not readable YAML"):
        load_config(path)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_saved_config_loads_unchanged(tmp_path: Path, path: Path) -> None:
    config = load_config(path)
    save_config(tmp_path / "config.yaml", config)
    assert changed_keys(config, tmp_path / "config.yaml") == {}
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=1e-9", "0.004 then, 1e-09 now"),
        ("seed=5", "0 then, 5 now"),
        ("lora.targets=[img_in]", "now"),
        ("weights.prompt=a", "None then, a now"),
        ("train.batch_size=16", "8 then, 16 now"),
        ("train.deterministic=true", "False then, True now"),
    ],
)
def test_changed_keys_are_listed(tmp_path: Path, override: str, expected: str) -> None:
    save_config(tmp_path / "config.yaml", load_config(TINY))
    changed = changed_keys(load_config(TINY, [override]), tmp_path / "config.yaml")
    assert list(changed) == [override.split("=")[0]] and expected in changed[override.split("=")[0]]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.devices=1", "found train.devices=1 and train.nodes=1, expected several"),
        ("quantize=int8", "found quantize=int8, .*expected null"),
        ("recompute_attention=false", "found compile=true, recompute and recompute_attention=false"),
        ("evaluate.rows=[adapted,maskless]", "found maskless in evaluate.rows"),
    ],
)
def test_settings_that_cannot_be_sharded_are_rejected(override: str, message: str) -> None:
    several = ["shard_base=true", "train.devices=2", "train.strategy=ddp", "compile=true", "recompute=1"]
    load_config(TINY, several)
    with pytest.raises(InputError, match=f"shard_base=true shards .*: {message}"):
        load_config(TINY, [*several, override])


def test_settings_that_do_not_affect_results_may_change_on_resume(tmp_path: Path) -> None:
    save_config(tmp_path / "config.yaml", load_config(TINY))
    values: dict[str, Any] = {
        **{
            "resume": "x",
            "run_dir": "/y",
            "recompute": 2,
            "recompute_attention": False,
            "compile": True,
            "shard_base": True,
            "encode_batch_size": 1,
            "train.dry_run": True,
            "data.workers": 7,
            "data.validation": 9,
            "data.max_faulty": 0.5,
        },
        **{"train.checkpoint_every": 3, "train.validate_every": 3, "train.max_skipped": 3, "train.strategy": "ddp"},
    }
    assert values.keys() == RESUMABLE
    assert changed_keys(load_config(TINY, [f"compile={values.pop('compile')}"]), tmp_path / "config.yaml") == {}
    several = ["train.devices=8", "train.batch_size=1"]  # for shard_base; the global batch stays the same
    changed = load_config(TINY, [*several, *(f"{key}={value}" for key, value in values.items())])
    assert changed_keys(changed, tmp_path / "config.yaml") == {}
    assert list(changed_keys(replace(changed, seed=9), tmp_path / "config.yaml")) == ["seed"]


@pytest.mark.parametrize("key", ["devices", "nodes", "accumulate"])
def test_a_global_batch_may_be_split_differently_on_resume(tmp_path: Path, key: str) -> None:
    save_config(tmp_path / "config.yaml", load_config(TINY))  # 8 samples per step
    assert changed_keys(load_config(TINY, ["train.batch_size=4", f"train.{key}=2"]), tmp_path / "config.yaml") == {}
    assert list(changed_keys(load_config(TINY, [f"train.{key}=2"]), tmp_path / "config.yaml")) == [f"train.{key}"]


def test_how_a_run_is_evaluated_may_change_on_resume(tmp_path: Path) -> None:
    save_config(tmp_path / "config.yaml", load_config(TINY, ["evaluate.published.adapted={background/psnr: 27.3}"]))
    changed = load_config(TINY, ["evaluate.batch_size=1", "evaluate.rows=[adapted]", "evaluate.samples=3"])
    assert changed_keys(changed, tmp_path / "config.yaml") == {}


def test_keys_missing_from_an_older_config_count_as_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_config(path, load_config(TINY))
    older = [line for line in path.read_text().splitlines() if "accumulate" not in line and "deterministic" not in line]
    path.write_text("\n".join([*older, "forgotten: 3"]))
    assert changed_keys(load_config(TINY), path) == {"forgotten": "3 then, absent now"}
    changed = changed_keys(load_config(TINY, ["train.deterministic=true"]), path)
    assert changed["train.deterministic"] == "False then, True now"


def test_a_file_overrides_its_base(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("job: decomposer\nname: below\nlora: {rank: 3}\noptim: {bits: 8, lr: 1e-3}")
    config = load_config(_written(tmp_path, "base: below.yaml\nname: a\noptim: {lr: 2e-3}"), ["lora.alpha=4"])
    assert (config.name, config.lora.rank, config.lora.alpha) == ("a", 3, 4.0)
    assert (config.optim.bits, config.optim.lr) == (8, 2e-3)


def test_invalid_bases_are_rejected_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config .*absent.yaml does not exist"):
        load_config(_written(tmp_path, "base: absent.yaml"))
    (tmp_path / "b.yaml").write_text("base: c.yaml")
    with pytest.raises(InputError, match=r"a\.yaml: base is b\.yaml, which has a base itself"):
        load_config(_written(tmp_path, "base: b.yaml"))
    (tmp_path / "b.yaml").write_text("job: decomposer\nlora: {rnak: 3}")
    with pytest.raises(InputError, match=r"b\.yaml: unknown key lora\.rnak"):
        load_config(_written(tmp_path, "base: b.yaml"))


def test_every_process_needs_a_validation_sample() -> None:
    with pytest.raises(InputError, match="data.validation is 16; expected at least one for each of 64 processes"):
        load_config(TINY.parent / "flux_fill.yaml", ["train.nodes=8"])
