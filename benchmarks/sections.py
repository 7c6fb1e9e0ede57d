"""The sections of docs/performance.md: one function for each benchmark, from its last result to Markdown.

Promises: every number is the result's; a target that was missed is called missed, by its median and nothing kinder.
Never reads a clock, a file or a machine, so that the same results give the same page.
"""

from collections.abc import Callable, Iterable


# What is aimed at: name -> (text, whether a median is good enough). A measurement without one has none.
TARGETS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "decode, table resident": ("at least 97 % of the donor's speed", lambda ratio: ratio >= 0.97),
    "decode, table on disk, warm": ("at least 96 %", lambda ratio: ratio >= 0.96),
    "prefill, table resident": ("at least 95 % of the donor's speed", lambda ratio: ratio >= 0.95),
    "prefill, table on disk, warm": ("at least 92 %", lambda ratio: ratio >= 0.92),
    "big load": ("at most 1.2 times", lambda times: times <= 1.2),
    "big memory": ("at most 64 MiB more", lambda more: more <= 64 * 2**20),
    "big decode": ("at least 92 %", lambda ratio: ratio >= 0.92),
    "scale": ("within 5 %", lambda times: times <= 1.05),
    "hooks": ("at most 1.05 times the rows that differ", lambda times: times <= 1.05),
    "hash one token": ("at least 4 times as fast as NumPy", lambda times: times >= 4),
    "hash text": ("at least twice as fast as NumPy", lambda times: times >= 2),
    "hash share": ("at most 0.5 % of the forward pass", lambda share: share <= 0.005),
}


def number(value: float, digits: int = 3) -> str:
    """A number for a reader: so many significant digits, thousands apart, no exponent."""
    rounded = float(f"{value:.{digits}g}")
    if abs(rounded) >= 1000:
        return f"{rounded:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".") if rounded else "0"


def spread_text(entry: dict, scale: float = 1, digits: int = 3) -> str:
    """Median, and the quartiles in brackets."""
    low, high = (number(scale * entry[name], digits) for name in ("q1", "q3"))
    return f"{number(scale * entry['median'], digits)} ({low} to {high})"


def percent(entry: dict) -> str:
    """A ratio as percent: median, and the quartiles in brackets."""
    return f"{100 * entry['median']:.1f} % ({100 * entry['q1']:.1f} to {100 * entry['q3']:.1f})"


def verdict(target: str, entry: dict) -> str:
    """The target beside what was measured."""
    text, good = TARGETS[target]
    return f"{text}: **{'reached' if good(entry['median']) else 'missed'}**"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def memory_sizes(sizes: dict) -> str:
    """A memory in words."""
    files = f"{sizes['files']} file{'s' if sizes['files'] > 1 else ''}"
    return (
        f"{sizes['rows']:,} rows of {sizes['row_bytes']} bytes ({sizes['table_bytes'] / 1e9:.2f} GB in {files}, "
        f"{sizes['table_dtype']}), layers {sizes['layers']}, orders {sizes['orders']}, {sizes['heads']} heads"
    )


def against_donor(result: dict, target: str, unit: str) -> str:
    """Decode and prefill: speeds of all ways and their ratio to the donor's."""
    text = [f"Memory: {memory_sizes(result['sizes'])}.", ""]
    for dtype, ways in result["measured"]["by_backbone_dtype"].items():
        rows = []
        for way, entry in ways.items():
            aim = verdict(f"{target}, {way}", entry["speed_ratio"]) if way.startswith("table") else ""
            rows.append([way, spread_text(entry["per_second"]), percent(entry["speed_ratio"]), aim])
        text += [table([f"backbone {dtype}", unit, "of the donor's speed", "target"], rows), ""]
    rounds = next(iter(next(iter(result["measured"]["by_backbone_dtype"].values())).values()))["seconds"]["rounds"]
    return "\n".join([*text, f"{rounds} rounds. {OTHER_DONOR}"])


OTHER_DONOR = (
    "All sides share the donor's weights in RAM, so that nothing but the memory differs. "
    '"donor, once more" is the donor compared with itself: differences as small as its own are the machine\'s.'
)


def decode(result: dict) -> str:
    """Section of `decode`."""
    sizes = result["sizes"]
    about = f"Greedy, one token a forward pass over a cache, {sizes['tokens_a_round']} tokens a round, batch 1."
    return f"{about} {against_donor(result, 'decode', 'tokens/s')}"


def prefill(result: dict) -> str:
    """Section of `prefill`."""
    about = f"{result['sizes']['tokens']:,} tokens of real text read at once into a cache, logits of the last position."
    return f"{about} {against_donor(result, 'prefill', 'tokens/s')}"


def hash_section(result: dict) -> str:
    """Section of `hash`."""
    rows = []
    for key, name, aim in (("one_token", "1 token", "hash one token"), ("long_text", "text", "hash text")):
        entry = result["measured"][key]
        share = entry["share_of_forward"]["share"]
        label = name if key == "one_token" else f"{result['sizes']['tokens'][1]:,} tokens"
        rows.append(
            [
                label,
                spread_text(entry["microseconds"]["demo"]),
                spread_text(entry["microseconds"]["ours"]),
                f"{spread_text(entry['times_faster'])}; {verdict(aim, entry['times_faster'])}",
                f"{100 * share['median']:.3f} %; {verdict('hash share', share)}",
            ]
        )
    head = ["", "NumPy, µs", "ours, µs", "times as fast", "share of a forward pass"]
    sizes = result["sizes"]
    return (
        f"From token ids to rows, {len(sizes['layers'])} layers, orders {sizes['orders']}, {sizes['heads']} heads of "
        f"{sizes['rows_a_head']:,} rows; integers compared before the times. NumPy is the January demo's procedure. "
        f"One token is hashed with the two before it, as decoding does.\n\n{table(head, rows)}"
    )


WARM_DECODE = ("decode", "on disk, warm")


def big(result: dict) -> str:
    """Section of `big`."""
    sizes, measured = result["sizes"], result["measured"]
    load, prefill_, decode_ = measured["load"], measured["prefill"], measured["decode"]
    held = [
        [
            name,
            spread_text(load["seconds"][key]),
            gigabytes(load["anonymous_bytes"][key]),
            gigabytes(load["file_bytes"][key]),
        ]
        for key, name in (("donor", "donor"), ("big", "with the table on disk"))
    ]
    speeds = []
    for what, entry in (("prefill", prefill_), ("decode", decode_), ("decode, cold", decode_["cold"])):
        for way, found in entry["speeds"].items():
            resident = entry["against_resident"].get(way)
            speeds.append(
                [
                    f"{what}: {way}",
                    spread_text(found["per_second"]),
                    percent(found["speed_ratio"])
                    + (f"; {verdict('big decode', found['speed_ratio'])}" if (what, way) == WARM_DECODE else ""),
                    percent(resident) if resident else "",
                ]
            )
    more = {"median": load["anonymous_bytes"]["big"]["median"] - load["anonymous_bytes"]["donor"]["median"]}
    peaks = {name: measured[name]["group_peak_bytes"] for name in ("load", "prefill", "decode")}
    known = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in peaks.items() if size is not None)
    share = prefill_.get("cached_share_when_cold")
    resident = sizes["resident"]["table_bytes"] / 1e9
    stayed = "." if share is None else f" (at most {100 * share:.2f} % of them stayed)."
    return "\n\n".join(
        [
            f"On disk: {memory_sizes(sizes['on_disk'])}. Every byte written and random. The processes that measure may "
            f"have {sizes['cap_bytes'] / 1e9:.0f} GB, page cache included (control group, version "
            f"{sizes['control_group_version']}); the most that they held: {known}.",
            table(["loading", "seconds", "anonymous memory, GB", "file-backed, GB"], held),
            f"Loading takes {spread_text(load['times_the_donor'])} times as long as the donor's "
            f"({load['seconds']['big']['rounds']} fresh processes each, by turns); "
            f"{verdict('big load', load['times_the_donor'])}.",
            f"After loading, {megabytes(load['anonymous_bytes'])} MB of anonymous memory and "
            f"{megabytes(load['file_bytes'])} MB of mapped files more are held than by the donor (medians); "
            f"anonymous {verdict('big memory', more)}.",
            table(["", "tokens/s", "of the donor", f"of a resident table of {resident:.2f} GB"], speeds),
            f"{sizes['prefill_tokens']:,} tokens are read, {sizes['decoded_tokens']} decoded along the text. Cold: the "
            f"table's files were dropped from the page cache before every round{stayed}",
        ]
    )


def gigabytes(entry: dict) -> str:
    """A spread of bytes in GB."""
    return spread_text(entry, 1e-9)


def megabytes(entry: dict) -> str:
    """How much more the graft holds than the donor, in MB."""
    return f"{(entry['big']['median'] - entry['donor']['median']) / 1e6:.1f}"


def scale(result: dict) -> str:
    """Section of `scale`."""
    measured, sizes = result["measured"], result["sizes"]
    rows = []
    for way, entry in measured["decode"].items():
        if way != "donor":
            rows.append(
                [
                    way,
                    spread_text(entry["seconds"], 1e3 / sizes["tokens_a_round"]),
                    percent(entry["speed_ratio"]),
                    spread_text(entry["times_the_smallest"]),
                    spread_text(measured["reading_microseconds_a_token"][way]),
                    spread_text(measured["reading_text_milliseconds"][way]),
                ]
            )
    text = f"{sizes['text_tokens']:,} tokens, ms"
    head = [
        "rows, place",
        "ms a token",
        "of the donor's speed",
        "times the smallest",
        "reading alone, µs a token",
        text,
    ]
    cold = [
        [way, spread_text(entry["seconds"], 1e3 / sizes["tokens_a_round"]), percent(entry["speed_ratio"])]
        for way, entry in measured["decode_cold"].items()
    ]
    row_bytes = next(iter(sizes["tables"].values()))["row_bytes"]
    return "\n\n".join(
        [
            f"Rows of {row_bytes} bytes, 32 read for each token; the address is computed, so more rows cost no more "
            "arithmetic, but lie further apart.",
            table(head, rows),
            "After the files were dropped from the page cache:",
            table(["rows, place", "ms a token", "of the donor's speed"], cold),
        ]
    )


def hooks(result: dict) -> str:
    """Section of `hooks`."""
    parts = [f"Table: {memory_sizes(result['sizes'])}."]
    for text, entry in result["measured"].items():
        rows = [
            [
                way,
                f"{found['h2d_bytes']:,}",
                f"{found['h2d_bytes_for_rows']:,}",
                number(found["times_unique_rows"], 5),
                spread_text(found["seconds"], 1e3),
            ]
            for way, found in entry["ways"].items()
        ]
        label = "1 token" if text == "1 tokens" else text
        head = [f"{label} (rows that differ: {entry['unique_row_bytes']:,} bytes)", "bytes to the device", "for rows"]
        parts.append(table([*head, "times the rows that differ", "ms a forward"], rows))
    return "\n\n".join(
        [
            *parts,
            "Bytes are counted by a device of the tests that is ordinary memory: they are exact, and the milliseconds "
            "are no accelerator's (a copy to it is a copy in RAM).",
        ]
    )


def peer(result: dict) -> str:
    """Section of `peer`."""
    sizes, measured = result["sizes"], result["measured"]
    rows = []
    for work, name in (("forward", f"forward, {sizes['forward_tokens']} tokens"), ("generate", "generate")):
        entry = measured[work]
        rows.append(
            [
                name if work == "forward" else f"generate, {sizes['generated_tokens']} tokens",
                spread_text(entry["times_the_donor"]["ours"]),
                spread_text(entry["times_the_donor"]["theirs"]),
                spread_text(entry["theirs_over_ours"]),
            ]
        )
    ours, theirs = sizes["sides"]["ours"], sizes["sides"]["theirs"]
    head = ["times the donor", "ours", "engram-peft", "theirs / ours"]
    return (
        f"{theirs['is']} beside {ours['is']}: tables of {theirs['table_bytes'] / 1e9:.2f} and "
        f"{ours['table_bytes'] / 1e9:.2f} GB in {sizes['dtype']}, the same prompts. Times are divided by those of the "
        f"plain donor in the same process.\n\n{table(head, rows)}"
    )


def placements(result: dict) -> str:
    """Section of `placements`."""
    parts = []
    for reads, states in result["measured"]["by_reads"].items():
        rows = [
            [
                way,
                spread_text(states["warm"][way]["microseconds_a_row"]),
                spread_text(states["cold"][way]["microseconds_a_row"]),
            ]
            for way in states["warm"]
        ]
        parts.append(table([reads, "warm, µs a row", "cold, µs a row"], rows))
    short = result["measured"]["shortened_file"]
    sizes = result["sizes"]
    ahead = f", on a disk that reads {sizes['read_ahead_bytes']:,} bytes ahead" if sizes["read_ahead_bytes"] else ""
    return "\n\n".join(
        [
            f"Rows of {sizes['row_bytes']} bytes out of a file of {sizes['file_bytes'] / 1e9:.1f} GB{ahead}.",
            *parts,
            "Rows on disk are read by position. A process that gathers from a mapping of a file which has meanwhile "
            f"been cut off is {short['mapped']}; a positioned read gives {short['positioned']}, and that becomes an "
            "error with the file's name.",
        ]
    )


SECTIONS: dict[str, tuple[str, Callable[[dict], str]]] = {
    "decode": ("Decoding", decode),
    "prefill": ("Prefill", prefill),
    "hash": ("Hashing", hash_section),
    "big": ("A table larger than memory", big),
    "scale": ("From a hundred thousand rows to a thousand million", scale),
    "hooks": ("Bytes to a device", hooks),
    "placements": ("Ways of reading rows", placements),
    "peer": ("Beside engram-peft", peer),
}
