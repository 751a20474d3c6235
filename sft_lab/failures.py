"""What a failed run says: what happened, and what to change, in place of a library's traceback."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator

from sft_lab import checkpoints, ranks
from sft_lab.errors import RunError, SftLabError
from sft_lab.runs import RunDirectory
from sft_lab.schema import Config

_NO_SPACE = ("No space left on device", "os error 28", "inline_container", "Disk quota exceeded")
_ROOM_BYTES = 1 << 30  # so much free is no full disk
_NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory")


@contextlib.contextmanager
def explained(config: Config, run: RunDirectory) -> Iterator[None]:
    """
    Raises:
        RunError: for want of disk or memory; any other error as it is.
    """
    try:
        yield
    except SftLabError:
        raise
    except Exception as error:
        told = _told(error, config, run)
        if told is None:
            raise
        raise told from error


def _told(error: Exception, config: Config, run: RunDirectory) -> RunError | None:
    """By its words too: safetensors and torch raise errors of their own for what the disk or the memory lacks."""
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(sign in text for sign in _NO_SPACE):
        return _no_space(config, run, text)
    if isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY):
        return _out_of_memory(config, text)
    return None


def _no_space(config: Config, run: RunDirectory, text: str) -> RunError:
    run.spend_reserve()
    without = ""
    if ranks.leads():  # the others share its directory
        checkpoints.drop_torn(run)
        without = " without what could not be saved"
    kept, _ = checkpoints.newest(run)
    goes_on = f"{kept.name} is whole, and `resume` goes on from it" if kept else "no checkpoint was saved yet"
    place = run.checkpoints if run.checkpoints.is_dir() else run.path
    free = shutil.disk_usage(place).free
    if free > _ROOM_BYTES:  # another one: /dev/shm, /tmp, a cache; or this one has no more room for names of files
        return RunError(f"no space is left on a device ({text.splitlines()[0]}), {place} has {free} bytes; {goes_on}")
    return RunError(
        f"the disk of {place} is full ({free} bytes are free{without}): make room, or lower "
        f"trainer.save_total_limit={config.trainer.save_total_limit}; {goes_on}"
    )


def _out_of_memory(config: Config, text: str) -> RunError:
    t = config.trainer
    halves = []
    if t.per_device_train_batch_size > 1:
        size = t.per_device_train_batch_size
        halves.append(f"trainer.per_device_train_batch_size={size} (accumulation makes up for it)")
    halves.append(f"trainer.max_length={t.max_length}")
    ways = [f"lower {' or '.join(halves)}"]
    if not t.gradient_checkpointing:
        ways.append("set trainer.gradient_checkpointing=true")
    if config.quant.method == "none" and config.peft.method != "none":
        ways.append("set quant=nf4")
    if config.distributed.method in ("single", "ddp"):
        ways.append("shard by distributed=fsdp2")
    return RunError(f"out of memory: {', '.join(ways)} ({text.strip().splitlines()[0] if text.strip() else 'no more'})")
