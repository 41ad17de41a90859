"""The tables of `benchmarks.compile_ahead`.

They show memory, FLOPs, collectives, the share of the losses on parameters, and an estimate of the
seconds.
"""

import collections
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.compiled import clock
from benchmarks.compiled.costs import Collective, Cost, Memory

ROWS = 20  # of collectives; the rest is summed up
SURROUNDINGS = (
    "jit(",
    "while",
    "body",
    "closed_call",
    "eval_jaxpr",
    "checkpoint",
    "rematted_computation",
    "layers",
    "shard_map",
)


def show(facts: Mapping, programs: Mapping[str, Mapping]) -> None:
    """Print all tables, of one device and one step."""
    console = Console(width=150)  # a narrower one would cut the numbers
    step = programs["step"]
    console.print(
        f"{facts['config']}: {facts['parameters']:,} parameters, {facts['devices']}, mesh "
        f"{facts['mesh']}, "
        f"{facts['tokens']:,.0f} tokens a device in {facts['micro_batches']} micro-batches; "
        f"compiled in {step['seconds']:.0f} s"
    )
    console.print(memory_table(step["memory"], facts["memory_bytes"]))
    for buffer in step["buffers"]:
        console.print(
            f"largest temporaries: {buffer.shape}, {gib(buffer.bytes)} GiB, "
            f"{describe(buffer.origin)}"
        )
    console.print(flops_table(facts, step["cost"]))
    console.print(collectives_table(step["cost"].collectives))
    if "parameter losses" in programs:
        console.print(share_table(programs, facts))
    if step["estimate"]:
        for line in estimate_lines(step["estimate"], facts):
            console.print(line)
    uncounted = {
        "counted as one turn, its length depends on data: loop of": step["cost"].open_loops,
        "not counted, a kernel of its own:": step["cost"].kernels,
    }
    for what, origins in uncounted.items():
        for origin, count in collections.Counter(map(describe, origins)).items():
            several = f", {count} of them" if count > 1 else ""
            console.print(f"{what} {origin}{several}")


def memory_table(memory: Memory, available: float | None) -> Table:
    """Memory by kind, beside that of the device."""
    table = numbers("", "GiB", "of the device", title="Memory")
    kinds = {
        "arguments (state, batch)": memory.arguments,
        "outputs not in their place": memory.outputs - memory.aliased,
        "temporaries": memory.temporaries,
        "program": memory.program,
    }
    for name, size in kinds.items():
        table.add_row(name, gib(size), percent(size, available))
    table.add_section()
    table.add_row("allocated", gib(memory.allocated), percent(memory.allocated, available))
    if available:
        table.add_row("in use at once", gib(memory.in_use), percent(memory.in_use, available))
        table.add_row("device", gib(available), "")
    return table


def balanced_flops(facts: Mapping, cost: Cost) -> float:
    """Matmul FLOPs when every device of an expert group is routed an equal share of its rows."""
    return cost.flops + cost.grouped_flops / facts["mesh"]["expert"]


def flops_table(facts: Mapping, cost: Cost) -> Table:
    """Compiled FLOPs beside those of the model: its matmuls forward, and twice that backward."""
    rate = facts["flops_per_s"]
    model = facts["model_flops"]
    times = ["ms at the peak rate"] if rate else []
    table = numbers("", "TFLOP", "of the model's", *times, title="Matmuls")
    rows = {
        "model, forward and backward": model,
        "compiled: dense": cost.flops,
        "compiled: experts, at equal load": cost.grouped_flops / facts["mesh"]["expert"],
        "compiled": balanced_flops(facts, cost),
    }
    for name, flops in rows.items():
        milliseconds = [f"{1e3 * flops / rate:.4g}"] if rate else []
        table.add_row(name, f"{flops / 1e12:.4g}", percent(flops, model), *milliseconds)
    return table


def collectives_table(found: Sequence[Collective]) -> Table:
    """A row for all collectives that are alike; those that send most come first."""
    table = numbers(
        "collective",
        "result",
        "devices",
        "runs",
        "MB each",
        "GB sent",
        "async",
        "of",
        title="Collectives",
        text=(0, 1, 7),
    )
    alike = collections.defaultdict(list)
    for one in found:
        alike[one.kind, one.shapes, one.group, one.asynchronous].append(one)
    rows = sorted(alike.values(), key=sent_by, reverse=True)
    for members in rows[:ROWS]:
        first = members[0]
        more = f" + {len(first.shapes) - 1} more" if len(first.shapes) > 1 else ""
        origins = list(dict.fromkeys(describe(one.origin) for one in members if one.origin))
        table.add_row(
            first.kind,
            first.shapes[0] + more,
            str(first.group),
            str(sum(one.times for one in members)),
            f"{first.bytes / 1e6:.3g}",
            f"{sent_by(members) / 1e9:.3g}",
            "yes" if first.asynchronous else "no",
            "; ".join(origins[:2]) or "not told",
        )
    table.add_section()
    rest = []
    for members in rows[ROWS:]:
        rest += members
    for name, members in (("others", rest), ("all", found)):
        runs = sum(one.times for one in members)
        table.add_row(name, "", "", str(runs), "", f"{sent_by(members) / 1e9:.3g}", "", "")
    return table


def sent_by(collectives: Sequence[Collective]) -> float:
    """The bytes that a device sends in all of them."""
    return sum(one.wire_bytes for one in collectives)


def share_table(programs: Mapping[str, Mapping], facts: Mapping) -> Table:
    """The losses on parameters beside the step, and the difference to a step without them."""
    step = programs["step"]
    alone = programs["parameter losses"]
    without = programs.get("step without them")
    titles = ["alone", "of the step"]
    if without:
        titles += ["step less step without", "of the step"]
    table = numbers("", *titles, title="Losses on parameters")

    def add(name: str, unit: float, read: Callable[[Mapping], float]) -> None:
        whole = read(step)
        values = [read(alone)]
        if without:
            values.append(whole - read(without))
        cells = []
        for value in values:
            cells += [f"{value / unit:.4g}", percent(value, whole)]
        table.add_row(name, *cells)

    def flops(program: Mapping) -> float:
        return balanced_flops(facts, program["cost"])

    def sent(program: Mapping) -> float:
        return program["cost"].wire_bytes

    def temporaries(program: Mapping) -> float:
        return program["memory"].temporaries

    add("matmuls, TFLOP", 1e12, flops)
    add("sent, GB", 1e9, sent)
    add("temporaries, GiB", 2**30, temporaries)
    return table


def estimate_lines(estimate: clock.Estimate, facts: Mapping) -> list[str]:
    """The parts of the clock's estimate, one line each, with the range of what is assumed."""
    names = {
        "cycles": "libtpu's own cycles",
        "kernels": "kernels: grouped matmuls at "
        f"{shares(clock.GROUPED)} of the peak, attention at {shares(clock.ATTENTION)}",
        "rows": "rows gathered and scattered, sorts: a guess",
        "collectives": f"collectives, links at {shares(clock.LINK)} of their rate",
        "asynchronous": "asynchronous collectives, taken to be hidden",
        "step": "step",
    }
    lines = ["Estimate, to compare programs; it is no speed, and nothing was run"]
    for name, text in names.items():
        lines.append(f"  {seconds(getattr(estimate, name))}  {text}")
    at_peak = facts["model_flops"] / facts["flops_per_s"]
    share = percent(at_peak, estimate.step.likely)
    lines.append(f"  {share} of the step would be the model's FLOPs at the peak rate")
    if estimate.unknown:
        lines.append(f"  {estimate.unknown} runs of instructions or kernels have no estimate")
    return lines


def shares(share: clock.Share) -> str:
    return f"{share.likely:.0%} ({share.best:.0%} to {share.worst:.0%})"


def seconds(time: clock.Seconds) -> str:
    """The likely time, and the range if something is assumed."""
    if time.best == time.worst:
        return f"{time.likely:.3g} s"
    return f"{time.likely:.3g} s ({time.best:.3g} to {time.worst:.3g})"


def describe(origin: str) -> str:
    """The end of a traced operation's name, and whether it is of the backward pass.

    The loops around the operation are left out.
    """
    first, *more = origin.split(":")  # operations that were merged
    words = []
    for word in first.split("/"):
        if not word.lstrip("(").startswith((*SURROUNDINGS, "jvp(", "transpose(")):
            words.append(word.strip("()"))
    text = "/".join(words[-3:])
    if more:
        text += f" + {len(more)}"
    if "transpose(" in first:
        text += " (backward)"
    return text


def numbers(*columns: str, title: str, text: Sequence[int] = (0,)) -> Table:
    """A table whose columns are aligned to the right, except those of text."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in text else "right", overflow="fold")
    return table


def gib(size: float) -> str:
    return f"{size / 2**30:.3g}"


def percent(part: float, whole: float | None) -> str:
    return f"{part / whole:.2%}" if whole else ""
