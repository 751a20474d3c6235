"""Packed documents do not see each other: logits and gradients of five architectures, and a proof that finds leaks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from sft_lab import attention, loss
from sft_lab import trainer as trainers
from sft_lab.attention import SDPA_PER_DOCUMENT, prove_isolation
from sft_lab.errors import ConfigError

WINDOW = 8
SIZE = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
LAYERS = ["sliding_attention", "full_attention"]
# config class and arguments; "llama" has grouped queries, "mistral", "qwen3" and "gemma3" a window shorter than a document
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**SIZE, **GROUPED}),
    "mistral": ("MistralConfig", {**SIZE, **GROUPED, "sliding_window": WINDOW}),
    "qwen3": (
        "Qwen3Config",
        {**SIZE, **GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": LAYERS},
    ),
    "gemma3": ("Gemma3TextConfig", {**SIZE, **GROUPED, "sliding_window": WINDOW, "layer_types": LAYERS}),
    "gpt2": ("GPT2Config", {**SIZE, "n_positions": 128}),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {**SIZE, "state_size": 8}),
    "lfm2": ("Lfm2Config", {**SIZE, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
    "falcon": ("FalconConfig", SIZE),
    "gpt_oss": (
        "GptOssConfig",
        {**SIZE, **GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": LAYERS},
    ),
    "gemma2": ("Gemma2Config", {**SIZE, **GROUPED, "sliding_window": WINDOW}),
    "llama4": (
        "Llama4TextConfig",
        {**SIZE, **GROUPED, "intermediate_size_mlp": 128, "attention_chunk_size": 8, "num_local_experts": 2},
    ),
}
BACKENDS = ["sdpa", "eager", SDPA_PER_DOCUMENT]
LENGTHS = (5, 30, 1, 17, 3)
# A logit is at most about 1 and comes of chains of some 300 sums: sqrt(300) * 2^-24 = 1e-6.
ATOL = 1e-6

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


@pytest.fixture(autouse=True)
def _registered() -> None:
    attention.register()


def make(name: str, implementation: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    kind, arguments = (ARCHITECTURES | OTHERS)[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**arguments, **more})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype)
    return model.eval()


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]


def row_of(parts: list[list[int]]) -> dict[str, Any]:
    """A packed row; a document's first label carries no loss, nothing before it may predict it."""
    return {
        "input_ids": [token for part in parts for token in part],
        "labels": [token for part in parts for token in [-100, *part[1:]]],
        "seq_lengths": [len(part) for part in parts],
    }


def collate_for(implementation: str) -> Collate:
    """The run's own: rows without a mask, or all documents of a batch in one flattened row."""
    return trainers.Collator(0, flatten=implementation == SDPA_PER_DOCUMENT)


def as_one_document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Position_ids that count on through all documents: every one sees those before it."""
    return trainers.Collator(0)([{**row, "seq_lengths": [len(row["input_ids"])]} for row in rows])


def flattened_as_one_document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    tokens = [token for row in rows for token in row["input_ids"]]
    return {"input_ids": torch.tensor([tokens]), "position_ids": torch.arange(len(tokens))[None]}


def without_positions(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


def logits_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits


def alone(model: Any, parts: list[list[int]]) -> torch.Tensor:
    """(tokens, vocabulary): each document by itself, without position_ids."""
    return torch.cat([logits_of(model, {"input_ids": torch.tensor([part])})[0] for part in parts])


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_logits_equal_unpacked_ones(name: str, implementation: str) -> None:
    """Two packed rows a batch, then two others, against eager attention over each document alone."""
    model, reference = make(name, implementation), make(name, "eager")
    for parts in (documents(), documents(LENGTHS[::-1])):
        rows = [parts, parts[2:] + parts[:2]]
        logits = logits_of(model, collate_for(implementation)([row_of(row) for row in rows]))
        packed = logits.reshape(len(rows), -1, logits.shape[-1])
        for got, row in zip(packed, rows, strict=True):
            torch.testing.assert_close(got, alone(reference, row), rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_batch_of_one_document_or_of_rows_is_right_too(name: str) -> None:
    """What a last batch may hold, and packed rows that were not flattened, which then pay for a mask."""
    model, parts = make(name, SDPA_PER_DOCUMENT), documents()
    single = logits_of(model, collate_for(SDPA_PER_DOCUMENT)([row_of(parts[1:2])]))[0]
    torch.testing.assert_close(single, alone(model, parts[1:2]), rtol=0, atol=ATOL)
    rows = logits_of(model, trainers.Collator(0)([row_of(parts), row_of(parts[:2])]))
    torch.testing.assert_close(rows[0], alone(model, parts), rtol=0, atol=ATOL)
    torch.testing.assert_close(rows[1, : sum(LENGTHS[:2])], alone(model, parts[:2]), rtol=0, atol=ATOL)


def gradients(model: Any, batches: list[dict[str, Any]]) -> list[torch.Tensor]:
    model.zero_grad()
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        loss.backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_gradients_equal_unpacked_ones(name: str, implementation: str) -> None:
    """Of every parameter, with gradient checkpointing of both kinds; the reference has none.

    Tolerance: a gradient sums over 51 tokens through two layers, sqrt(51 * 300) * 2^-24 = 7e-6 of the largest.
    """
    parts = [part for part in documents() if len(part) > 1]
    model = make(name, implementation).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # GPT-2 has it by default
            module.p = 0.0
    expected = gradients(
        make(name, "eager"),
        [{"input_ids": torch.tensor([part]), "labels": torch.tensor([[-100, *part[1:]]])} for part in parts],
    )
    batch = collate_for(implementation)([row_of(parts)])
    scale = max(float(gradient.abs().max()) for gradient in expected)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for got, wanted in zip(gradients(model, [batch]), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["stored", "checkpointed", "reentrant"])
@pytest.mark.parametrize("head", ["ours", "trl"])
def test_sft_trainer_passes_the_boundaries_down(tmp_path: Path, checkpointing: bool | None, head: str) -> None:
    """A step of SFTTrainer on an adapter under either head: flattened, and one row a document under sdpa.

    Tolerance: as for gradients elsewhere, 1e-5 of the largest.
    """
    parts = documents((5, 30, 2, 17, 3, 40))
    expected, unpacked_loss = step_of("sdpa", [[part] for part in parts], tmp_path, checkpointing, head)
    got, packed_loss = step_of(SDPA_PER_DOCUMENT, [parts[:3], parts[3:]], tmp_path, checkpointing, head)
    assert packed_loss == pytest.approx(unpacked_loss, rel=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in expected)
    assert scale > 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * scale)


def step_of(
    implementation: str, rows: list[list[list[int]]], path: Path, checkpointing: bool | None, head: str
) -> tuple[list[torch.Tensor], float]:
    """The gradients and the loss of one step of SFTTrainer on all `rows` at once."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=make("llama", implementation),
        args=SFTConfig(
            output_dir=str(path), max_steps=1, logging_steps=1, per_device_train_batch_size=len(rows), max_grad_norm=0.0,
            gradient_checkpointing=checkpointing is not None, use_cpu=True, bf16=False, report_to="none",
            gradient_checkpointing_kwargs=None if checkpointing is None else {"use_reentrant": checkpointing},
            remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}, save_strategy="no",
            dataloader_pin_memory=False, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([row_of(row) for row in rows]),
        processing_class=tokenizer(),
        data_collator=collate_for(implementation),
        peft_config=LoraConfig(target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False),
    )  # fmt: skip
    if head == "ours":
        loss.score_supervised_only(trainers.causal_lm(trainer.model))
    kept: list[torch.Tensor] = []
    trainer.add_callback(keep_gradients(trainer.model, kept))
    trainer.train()
    return kept, trainer.state.log_history[0]["loss"]


def tokenizer() -> Any:
    """One that SFTTrainer can hold; the rows are tokens already."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def keep_gradients(model: Any, kept: list[torch.Tensor]) -> Any:
    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            kept.extend(p.grad.clone() for p in model.parameters() if p.requires_grad)

    return Keep()


def test_attention_is_paid_per_document() -> None:
    """A flattened row of five documents costs the attention of each of them, not that of a row of 56 tokens."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention_flops(batch: dict[str, Any]) -> int:
        def count(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:  # shapes
            return sdpa_flop_count(query, key, value)

        with FlopCounterMode(display=False, custom_mapping={on_cpu: count}) as counter:
            logits_of(make("llama", SDPA_PER_DOCUMENT), batch)
        return counter.get_flop_counts()["Global"][on_cpu]

    row = row_of(documents())
    share = attention_flops(collate_for(SDPA_PER_DOCUMENT)([row])) / attention_flops(without_positions([row]))
    assert share == pytest.approx(sum(n * n for n in LENGTHS) / sum(LENGTHS) ** 2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padded_rows_answer_as_each_row_alone(name: str) -> None:
    """Held-out rows: one document each, padded on the right, no mask, position_ids counting on."""
    model, parts = make(name, SDPA_PER_DOCUMENT), documents()
    rows = [{k: v for k, v in row_of([part]).items() if k != "seq_lengths"} for part in parts]
    logits = logits_of(model, trainers.Collator(0)(rows))
    got = torch.cat([logits[i, : len(part)] for i, part in enumerate(parts)])
    torch.testing.assert_close(got, alone(make(name, "eager"), parts), rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_is_that_of_sdpa(name: str) -> None:
    """Prompts padded on the left, a cache, single tokens decoded past the window: number for number."""
    prompts = documents((14, 5, 9))
    padded = torch.tensor([[0] * (14 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (14 - len(p)) + [1] * len(p) for p in prompts])
    results = [
        make(name, implementation).generate(
            padded, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
        )
        for implementation in ("sdpa", SDPA_PER_DOCUMENT)
    ]  # fmt: skip
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert torch.equal(torch.stack(results[0].logits), torch.stack(results[1].logits))


def test_dropout_is_on_in_training_only() -> None:
    model = make("llama", SDPA_PER_DOCUMENT, attention_dropout=0.5)
    batch = collate_for(SDPA_PER_DOCUMENT)([row_of(documents())])
    evaluated = logits_of(model, batch)
    assert torch.equal(evaluated, logits_of(model, batch))
    model.train()
    lone = sum(LENGTHS[:2])  # a document of one token: in every head its weight is now 0 or 2, never 1
    assert not torch.allclose(evaluated[0, lone], logits_of(model, batch)[0, lone], rtol=0, atol=1e-3)


def test_boundaries_that_do_not_come_through_are_an_error() -> None:
    """A key dropped on the way, a mask or a cache beside it: each would let documents see each other."""
    model = make("llama", SDPA_PER_DOCUMENT)
    batch = {k: v for k, v in collate_for(SDPA_PER_DOCUMENT)([row_of(documents())]).items() if k != "labels"}
    mask = torch.ones_like(batch["input_ids"])
    for wrong in (
        {k: v for k, v in batch.items() if k != "cu_seq_lens_q"},
        {k: v for k, v in batch.items() if k != "position_ids"},
        {**batch, "attention_mask": mask},
        {**batch, "use_cache": True},
    ):
        with pytest.raises(ConfigError, match="cu_seq_lens_q"):
            model(**{"use_cache": False, **wrong})


@pytest.mark.parametrize(
    ("name", "needs"),
    [("gpt_oss", "attention sinks"), ("gemma2", "capped attention scores"), ("llama4", "attention in chunks")],
)
def test_what_sdpa_would_leave_out_is_refused(name: str, needs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that Transformers lets near sdpa by mistake; it ignores sinks without a word."""
    base = type(make(name, "eager")).__mro__[1]
    monkeypatch.setattr(base, "_supports_sdpa", True)
    model = make(name, SDPA_PER_DOCUMENT)
    with pytest.raises(ConfigError, match=f"model.attn_implementation=sdpa_per_document : this model needs {needs}"):
        prove_isolation(model, collate_for(SDPA_PER_DOCUMENT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_isolation_is_proved(name: str, implementation: str, dtype: torch.dtype) -> None:
    prove_isolation(make(name, implementation, dtype), collate_for(implementation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("leaking", [as_one_document, flattened_as_one_document, without_positions])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_leak_is_found(name: str, leaking: Collate, dtype: torch.dtype) -> None:
    for implementation in BACKENDS:
        told = (
            rf"trainer\.packing=true with model\.attn_implementation={implementation} : a document sees the one before"
        )
        with pytest.raises(ConfigError, match=told):
            prove_isolation(make(name, implementation, dtype), leaking)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("mamba", "eager"),  # its state runs on through the row
        ("lfm2", "sdpa"),  # only a convolution over three tokens reaches across; attention does not
        ("lfm2", SDPA_PER_DOCUMENT),
        ("falcon", "sdpa"),  # builds its mask without position_ids
    ],
)
def test_a_model_that_cannot_keep_documents_apart_is_found(name: str, implementation: str, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=r"a document sees the one before it.*allowed: trainer\.packing=false"):
        prove_isolation(make(name, implementation, dtype), trainers.Collator(0))


def test_a_flattened_row_that_the_model_cannot_take_is_told() -> None:
    """TRL's padding-free batch says so much of the documents that Transformers itself asks for a kernel."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    with pytest.raises(ConfigError, match=r"does not take packed rows: .*causal_conv1d"):
        prove_isolation(make("lfm2", SDPA_PER_DOCUMENT), DataCollatorForLanguageModeling(0, padding_free=True))


def test_wrong_positions_are_found() -> None:
    """Documents apart, but the second counts on where the first stopped: learned positions are then others."""

    def counting_on(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate_for(SDPA_PER_DOCUMENT)(rows)
        second = batch["position_ids"] + 40 * (torch.arange(batch["input_ids"].shape[1]) >= 12)
        return {**batch, "position_ids": second}

    with pytest.raises(ConfigError, match="away from those it gives unpacked"):
        prove_isolation(make("gpt2", SDPA_PER_DOCUMENT), counting_on)


def test_the_proof_leaves_no_trace() -> None:
    """With an adapter in training and dropout everywhere: modes, gradients and random numbers stay as they were."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(make("llama", SDPA_PER_DOCUMENT, attention_dropout=0.5), lora).train()
    model.get_base_model().lm_head.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    prove_isolation(model, collate_for(SDPA_PER_DOCUMENT))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ConfigError):
        prove_isolation(model, as_one_document)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_int8_passes_although_tokens_share_its_columns(tmp_path: Path) -> None:
    """LLM.int8 picks the columns that it keeps in 16 bits by all tokens of a batch: documents differ, yet do not leak."""
    make("llama", "eager").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        attn_implementation=SDPA_PER_DOCUMENT,
        quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=2.5),
    )
    collate = collate_for(SDPA_PER_DOCUMENT)
    first, other = documents((12, 12))
    changed = [logits_of(model, collate([row_of([part, first])]))[0, 12:] for part in (first, other)]
    assert not torch.equal(*changed)
    prove_isolation(model, collate)
    with pytest.raises(ConfigError):
        prove_isolation(model, as_one_document)
