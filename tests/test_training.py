"""SFTTrainer over our tokens, held to a plain PyTorch loop, and what it trains and leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sft_lab import config as configs
from sft_lab import embedded
from sft_lab import trainer as trainers
from sft_lab.data.prepare import prepare
from sft_lab.data.prepared import Prepared
from sft_lab.data.tokenize import IGNORE
from sft_lab.runs import RunDirectory
from sft_lab.schema import Config

BASE = [
    "model=tiny_llama", "tracking=none", "peft=lora_r8", "peft.lora_dropout=0", "data.train_rows=16", "data.eval_rows=4",
    "trainer.learning_rate=1e-2", "trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0", "trainer.max_grad_norm=0",
    "trainer.weight_decay=0", "trainer.logging_steps=1", "trainer.max_steps=3",
]  # fmt: skip


def make(overrides: list[str], path: Path) -> tuple[Config, Prepared, Any]:
    """A config, its data, and the trainer on them."""
    from transformers import set_seed

    config = configs.to_config(configs.compose([*BASE, *overrides]))
    data = prepare(config)
    set_seed(config.seed)
    return config, data, trainers.build(config, RunDirectory(path), data, [])


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def order_of(trainer: Any) -> list[dict[str, torch.Tensor]]:
    """The micro-batches that the trainer will draw, in order."""
    return list(trainer.get_train_dataloader())


def plain_loop(model: Any, batches: list[dict[str, torch.Tensor]], accumulation: int, lr: float) -> tuple[list, list]:
    """Losses and gradients of each step of AdamW with nothing of Trainer, TRL or Accelerate in it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses, gradients = [], []
    model.train()
    for start in range(0, len(batches), accumulation):
        micro = batches[start : start + accumulation]
        supervised = sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in micro)
        total = 0.0
        for batch in micro:
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]),
                batch["labels"][:, 1:].reshape(-1),
                ignore_index=IGNORE,
                reduction="sum",
            )
            (loss / supervised).backward()
            total += float(loss.detach()) / supervised
        losses.append(total)
        gradients.append([p.grad.clone() for p in parameters])
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


class Gradients:
    """Keeps what the optimizer is about to use, step by step."""

    def __init__(self, model: Any):
        from transformers import TrainerCallback

        seen: list[list[torch.Tensor]] = []

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                seen.append([p.grad.clone() for p in model.parameters() if p.requires_grad])

        self.callback, self.seen = Keep(), seen


@pytest.mark.parametrize(("micro", "accumulation"), [(4, 1), (1, 4)])
def test_three_steps_equal_a_plain_loop(tmp_path: Path, micro: int, accumulation: int) -> None:
    """Losses and adapter gradients of three steps of four rows.

    Tolerance: float32 has 2^-24 = 6e-8 relative error an operation; a gradient here is a sum of about 300 supervised
    tokens through two layers, added up in another order, so 1e-5 of the largest gradient leaves a margin of about 10
    over sqrt(300) * 6e-8.
    """
    sizes = [f"trainer.per_device_train_batch_size={micro}", f"trainer.gradient_accumulation_steps={accumulation}"]
    config, data, trainer = make(sizes, tmp_path / "a")
    twin = make(sizes, tmp_path / "b")[2].model
    batches = order_of(trainer)[: 3 * accumulation]
    keep = Gradients(trainer.model)
    trainer.add_callback(keep.callback)
    trainer.train()
    losses, gradients = plain_loop(twin, batches, accumulation, config.trainer.learning_rate)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-5)
    for ours, plain in zip(keep.seen, gradients, strict=True):
        scale = max(float(g.abs().max()) for g in plain)
        assert scale > 0
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * scale)


def test_accumulation_does_not_change_the_step(tmp_path: Path) -> None:
    """One micro-batch of four rows and four of one give the same adapter after three steps.

    Adam divides by the root of the second moment, so where a gradient is rounding noise its step is not small:
    tolerance is a thousandth of the three steps of 1e-2 that a weight can have moved.
    """
    adapters = []
    for micro, accumulation in ((4, 1), (1, 4)):
        sizes = [f"trainer.per_device_train_batch_size={micro}", f"trainer.gradient_accumulation_steps={accumulation}"]
        sizes.append("trainer.train_sampling_strategy=random")  # batches of like length depend on their size
        trainer = make(sizes, tmp_path / str(micro))[2]
        trainer.train()
        adapters.append(adapter_of(trainer.model))
    for name, value in adapters[0].items():
        torch.testing.assert_close(value, adapters[1][name], rtol=0, atol=3e-5)


def test_packed_rows_give_the_gradients_of_unpacked_ones(tmp_path: Path) -> None:
    """The same sixteen rows in one step, packed into rows of 512 tokens or one a row."""
    seen = []
    for overrides in (
        ["trainer.packing=true", "trainer.max_length=512", "trainer.per_device_train_batch_size=16"],
        ["trainer.per_device_train_batch_size=16"],
    ):
        trainer = make([*overrides, "trainer.max_steps=1"], tmp_path / str(len(seen)))[2]
        keep = Gradients(trainer.model)
        trainer.add_callback(keep.callback)
        trainer.train()
        seen.append((keep.seen[0], trainer.train_dataset))
    packed, unpacked = seen
    assert len(packed[1]) < len(unpacked[1])
    scale = max(float(g.abs().max()) for g in unpacked[0])
    for a, b in zip(packed[0], unpacked[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * scale)


def test_our_head_gives_the_loss_and_gradients_of_trls(tmp_path: Path) -> None:
    from sft_lab import loss

    results = []
    for ours in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not ours:
                patch.setattr(loss, "score_supervised_only", lambda model: None)
            trainer = make(["trainer.max_steps=1"], tmp_path / str(ours))[2]
        keep = Gradients(trainer.model)
        trainer.add_callback(keep.callback)
        trainer.train()
        results.append((trainer.state.log_history[0], keep.seen[0]))
    (log_a, a), (log_b, b) = results
    for key in ("loss", "entropy", "mean_token_accuracy"):
        assert log_a[key] == pytest.approx(log_b[key], rel=1e-5)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ([], False),
        (["peft.modules_to_save=[lm_head]"], True),
        (["distributed.cpu_offload=true"], True),
        (["distributed=single", "distributed.num_processes=1", "peft.modules_to_save=[lm_head]"], False),
    ],
)
def test_a_sharded_head_is_called_where_reading_its_weight_goes_wrong(
    words: list[str], ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GPUs, where TRL's own head is the one to take otherwise."""
    monkeypatch.setattr(trainers.models, "device", lambda: "cuda")
    monkeypatch.setattr(trainers.distributed, "arguments", lambda config: {})  # there is one process here
    trainer = make(["distributed=fsdp2", "distributed.num_processes=2", *words], tmp_path)[2]
    code = trainers.causal_lm(trainer.model).forward.__func__.__code__
    assert (Path(code.co_filename).parts[-2:] == ("sft_lab", "loss.py")) == ours


def test_only_the_adapter_is_trained(tmp_path: Path) -> None:
    """The base's weights are byte-equal after training, and the optimizer has no state for them."""
    trainer = make([], tmp_path)[2]
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    before = adapter_of(trainer.model)
    trainer.train()
    assert frozen
    assert all("lora_" in name for name in before)
    for name, value in trainer.model.named_parameters():
        if name in frozen:
            assert torch.equal(value, frozen[name]), name
    assert any(not torch.equal(value, before[name]) for name, value in adapter_of(trainer.model).items())
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for _, p in trainer.model.named_parameters() if p.requires_grad}
    checkpoint = torch.load(tmp_path / "checkpoints" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert len(checkpoint["state"]) == len(before)
    assert {s["exp_avg"].numel() for s in checkpoint["state"].values()} == {v.numel() for v in before.values()}


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    seen = []
    for overrides in (
        ["trainer.gradient_checkpointing=false"],
        ["trainer.gradient_checkpointing=true"],
        ["trainer.gradient_checkpointing=true", "trainer.use_reentrant=true"],
    ):
        trainer = make([*overrides, "trainer.max_steps=1"], tmp_path / str(len(seen)))[2]
        keep = Gradients(trainer.model)
        trainer.add_callback(keep.callback)
        trainer.train()
        seen.append(keep.seen[0])
    assert any(float(g.abs().max()) > 0 for g in seen[0])
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_quantised_base_learns(tmp_path: Path, quant: str) -> None:
    """Twenty steps on a base in 4 or 8 bits: its layers are quantised for real, and the loss falls.

    A random base says ln(978 tokens) = 6.89 to everything, give or take 0.1 a batch; a twentieth less is learned.
    """
    import bitsandbytes as bnb

    overrides = [f"quant={quant}", "trainer.max_steps=20", "peft.lora_alpha=32"]
    trainer = make(overrides, tmp_path)[2]
    kind = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}[quant]
    assert any(isinstance(module, kind) for module in trainer.model.modules())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) / 5 < 0.95 * sum(losses[:5]) / 5


def test_every_trainer_key_reaches_sft_config(tmp_path: Path) -> None:
    """Values other than the defaults, so that none can be there by accident."""
    given: dict[str, Any] = {
        "learning_rate": 3e-4, "lr_scheduler_type": "linear", "warmup_steps": 7, "weight_decay": 0.01, "max_grad_norm": 0.3,
        "optim": "sgd", "num_train_epochs": 2.5, "max_steps": 17, "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 5, "gradient_accumulation_steps": 2, "max_length": 333, "logging_steps": 9,
        "eval_steps": 11, "save_steps": 13, "save_total_limit": 4, "dataloader_num_workers": 1, "gradient_checkpointing": True,
    }  # fmt: skip
    overrides = [f"trainer.{key}={value}" for key, value in given.items()]
    overrides += [
        "trainer.use_reentrant=true",
        "trainer.precision=bf16",
        "trainer.extra.neftune_noise_alpha=5",
        "seed=9",
    ]
    config = configs.to_config(configs.compose(["model=tiny_llama", *overrides]))
    arguments = trainers.build_arguments(config, RunDirectory(tmp_path))
    for key, value in given.items():
        assert getattr(arguments, key) == value, key
    assert arguments.gradient_checkpointing_kwargs == {"use_reentrant": True}
    assert (arguments.bf16, arguments.fp16, arguments.seed, arguments.neftune_noise_alpha) == (True, False, 9, 5)


def test_every_peft_and_quant_key_reaches_its_class() -> None:
    from sft_lab import adapter, quant

    config = configs.to_config(
        configs.compose(
            [
                "peft.r=4", "peft.lora_alpha=6", "peft.lora_dropout=0.2", "peft.target_modules=[q_proj]",
                "peft.modules_to_save=[lm_head]", "peft.bias=all", "peft.use_rslora=true", "peft.use_dora=true",
                "peft.extra.layers_to_transform=[0]", "quant=nf4", "quant.bnb_4bit_quant_type=fp4",
                "quant.bnb_4bit_use_double_quant=false", "quant.extra.bnb_4bit_quant_storage=float32",
            ]
        )
    )  # fmt: skip
    lora = adapter.build(config.peft)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (4, 6, 0.2, {"q_proj"})
    assert (lora.modules_to_save, lora.bias, lora.use_rslora, lora.use_dora) == (["lm_head"], "all", True, True)
    assert lora.layers_to_transform == [0]
    four = quant.build(config.quant, "float16")
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("fp4", False)
    assert (four.bnb_4bit_compute_dtype, four.bnb_4bit_quant_storage) == (torch.float16, torch.float32)
    eight = configs.to_config(configs.compose(["quant=int8", "quant.llm_int8_threshold=4"]))
    assert quant.build(eight.quant, "float32").llm_int8_threshold == 4


def test_model_keys_reach_from_pretrained(tmp_path: Path) -> None:
    from sft_lab import model as models

    path = embedded.resolve("embedded:tiny_llama")
    config = configs.to_config(
        configs.compose(
            ["model=from_path", f"model.path={path}", "model.dtype=bfloat16", "model.attn_implementation=eager"]
        )
    )
    model = models.load_model(config)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
