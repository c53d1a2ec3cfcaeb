"""The line about an interval of steps that a person reads; metrics.jsonl has everything."""

from collections.abc import Collection

WAITING_SHARE = 0.05  # of the time, from which on waiting for data is worth a word


def log_line(values: dict[str, float], terms: Collection[str]) -> str:
    """``values`` of a line of metrics.jsonl, of which ``terms`` are those of the losses and beside them; a step need
    not have computed all."""
    parts = [f"loss {values['loss']:.4g}"]
    parts += [f"{name} {values[name]:.4g}" for name in terms if name in values and values[name] != values["loss"]]
    parts.append(f"lr {values['lr']:.3g}")
    if "grad_norm" in values:  # not where the discriminator alone has learned
        parts.append(f"grad_norm {values['grad_norm']:.3g}")
    parts.append(f"{values['samples_per_s']:.4g} samples/s")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.0%}")
    elif "tokens_per_s" in values:
        parts.append(f"{values['tokens_per_s']:,.0f} tokens/s")
    if values["data_wait_share"] >= WAITING_SHARE:
        parts.append(f"{values['data_wait_share']:.0%} waiting for data")
    if values["samples_replaced"]:
        parts.append(f"{values['samples_replaced']:.0f} samples replaced")
    if values.get("steps_skipped"):
        parts.append(f"{values['steps_skipped']:.0f} steps skipped")
    return "  ".join(parts)
