"""`internimage inspect variants`, `search-space`, `ablations`: the published models and the paper's rules, as tables.

Each function returns rows (plain dictionaries, for --json) and a rich table of them.
"""

import math
from typing import Any

from rich.table import Table

from pretrain.analysis.costs import training_bytes
from pretrain.models.ablation import ABLATIONS, PUBLISHED, sharing_saves
from pretrain.models.activations import image_activations
from pretrain.models.counting import multiply_adds, parameters
from pretrain.models.scaling import ALPHA, BETA, ORIGIN, candidates, scale
from pretrain.models.variants import VARIANTS

Rows = list[dict[str, Any]]
MEMORY_SETTING = (224, 32)  # pixels and batch of the paper's memory figure, which is per image


def variants_table() -> tuple[Rows, Table]:
    """The seven published models: counted parameters and multiply-adds beside the published ones, and the scaling
    rule's answer.
    """
    rows: Rows = []
    for name, variant in VARIANTS.items():
        arguments = variant.arguments
        phi = math.log(arguments["channels"] / ORIGIN.channels) / math.log(BETA)
        rule = scale(phi)
        rows.append(
            {
                "name": name,
                "channels": arguments["channels"],
                "depths": list(arguments["depths"]),
                "groups": list(arguments["groups"]),
                "norm": _norm(arguments),
                "layer_scale": arguments.get("layer_scale"),
                "offset_scale": arguments.get("offset_scale", 1.0),
                "image_size": variant.image_size,
                "parameters": parameters(arguments).total,
                "published_parameters_m": variant.parameters,
                "multiply_adds": multiply_adds(arguments, variant.image_size).total,
                "multiply_adds_as_published": multiply_adds(arguments, variant.image_size, as_published=True).total,
                "published_multiply_adds_g": variant.flops,
                "published_top1": variant.top1,
                "phi": round(phi, 2),
                "depth": sum(arguments["depths"]),
                "rule_depth": rule.depth,
            }
        )
    table = Table(
        title="InternImage, 1000 classes",
        caption="G multiply-adds: all, and without the centre scale and head of H and G, which rounds to the published "
        f"ones. phi: C1 = {ORIGIN.channels} * {BETA}^phi; rule: depth {ORIGIN.depth} * {ALPHA}^phi, which the "
        "published models follow loosely.",
    )
    for heading in (
        "",
        "C1",
        "depths",
        "groups",
        "norm",
        "px",
        "M params",
        "published",
        "G mult-adds",
        "rounding",
        "published",
    ):
        text = heading in ("", "depths", "groups", "norm")
        table.add_column(heading, justify="left" if text else "right", no_wrap=text)
    for heading in ("top-1", "phi", "depth", "rule"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["name"].removeprefix("internimage_").upper(),
            str(row["channels"]),
            ",".join(map(str, row["depths"])),
            ",".join(map(str, row["groups"])),
            row["norm"],
            str(row["image_size"]),
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['published_parameters_m']:g}",
            f"{row['multiply_adds'] / 1e9:.1f}",
            f"{row['multiply_adds_as_published'] / 1e9:.1f}",
            f"{row['published_multiply_adds_g']:g}",
            f"{row['published_top1']:g}",
            f"{row['phi']:g}",
            str(row["depth"]),
            str(row["rule_depth"]),
        )
    return rows, table


def search_space_table(image_size: int = 224) -> tuple[Rows, Table]:
    """The 30 candidates of the paper's search, those that cannot be built marked with the reason."""
    rows: Rows = []
    for candidate in candidates():
        stack = candidate.stack
        row: dict[str, Any] = {
            "channels": stack.channels,
            "group_width": stack.group_width,
            "l1": stack.l1,
            "l3": None if candidate.parameters is None else stack.l3,
            "parameters": candidate.parameters,
            "multiply_adds": None,
            "reason": candidate.reason,
            "origin": stack == ORIGIN,
        }
        if candidate.parameters is not None:
            row["multiply_adds"] = multiply_adds(stack.arguments(), image_size).total
        rows.append(row)
    built = sum(row["reason"] is None for row in rows)
    table = Table(
        title=f"Search space: {len(rows)} candidates of about 30 M parameters, {built} of which can be built",
        caption="C1 in 48, 64, 80; L1 in 1..5; C' in 16, 32; L1 = L2 = L4 <= L3, chosen for 30 M. * the origin, T.",
    )
    for heading in ("C1", "C'", "L1", "L3", "M params", f"G @{image_size}"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(
            str(row["channels"]),
            str(row["group_width"]),
            str(row["l1"]),
            "-" if row["l3"] is None else str(row["l3"]),
            "-" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f}",
            "-" if row["multiply_adds"] is None else f"{row['multiply_adds'] / 1e9:.2f}",
            "*" if row["origin"] else (f"cannot be built: {row['reason']}" if row["reason"] else ""),
        )
    return rows, table


def ablation_table() -> tuple[Rows, Table]:
    """The paper's ablations: parameters, multiply-adds and memory of T and H so changed, and the published scores of T.

    The row of the unshared weights has `sharing_saves`: shares of the unshared H, counted and derived.
    """
    rows: Rows = []
    for name, change in ABLATIONS.items():
        row: dict[str, Any] = {"ablation": name, "published_top1": None, "published_box_ap": None}
        for model in ("internimage_t", "internimage_h"):
            arguments = {**VARIANTS[model].arguments, **change}
            row[f"{model}_parameters"] = parameters(arguments).total
            row[f"{model}_multiply_adds"] = multiply_adds(arguments, VARIANTS[model].image_size).total
        row["internimage_h_training_bytes_an_image"] = round(training_bytes(arguments, *MEMORY_SETTING))
        if name in PUBLISHED:
            row["published_top1"], row["published_box_ap"] = PUBLISHED[name]
        rows.append(row)
    saves = rows[-1]["sharing_saves"] = _sharing_saves()
    pixels, batch = MEMORY_SETTING
    table = Table(
        title="Ablations of the operator",
        caption=f"Sharing weights saves H {saves['parameters']:.1%} of its parameters "
        f"({saves['parameters_no_head']:.1%} without the head; published 42.0%). Memory is derived, and none of its "
        "definitions gives the published 84.2%: "
        f"training in fp32 with AdamW, per image at {pixels} px and batch {batch}: {saves['training_memory']:.1%} "
        f"(activations alone {saves['activations']:.1%}); one operator between its projections, at its peak: "
        f"{saves['operator_memory']:.1%}. Unshared: an output projection for each of the 9 points.",
    )
    table.add_column("")
    for heading in ("T: M params", f"G @{VARIANTS['internimage_t'].image_size}", "H: M params"):
        table.add_column(heading, justify="right")
    table.add_column(f"G @{VARIANTS['internimage_h'].image_size}", justify="right")
    table.add_column(f"MB an image @{pixels}", justify="right")
    for heading in ("published top-1 (T)", "published box AP (T)"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["ablation"],
            f"{row['internimage_t_parameters'] / 1e6:.2f}",
            f"{row['internimage_t_multiply_adds'] / 1e9:.2f}",
            f"{row['internimage_h_parameters'] / 1e6:.1f}",
            f"{row['internimage_h_multiply_adds'] / 1e9:.1f}",
            f"{row['internimage_h_training_bytes_an_image'] / 1e6:.0f}",
            "" if row["published_top1"] is None else f"{row['published_top1']:g}",
            "" if row["published_box_ap"] is None else f"{row['published_box_ap']:g}",
        )
    return rows, table


def _sharing_saves() -> dict[str, float]:
    shared = VARIANTS["internimage_h"].arguments
    unshared = {**shared, "share_weights": False}
    pixels, batch = MEMORY_SETTING
    counted = sharing_saves(shared)
    whole = [training_bytes(arguments, pixels, batch) for arguments in (shared, unshared)]
    kept = [image_activations(arguments, pixels, checkpointing=False).kept for arguments in (shared, unshared)]
    return {
        "parameters": counted.parameters,
        "parameters_no_head": counted.backbone,
        "training_memory": 1 - whole[0] / whole[1],
        "activations": 1 - kept[0] / kept[1],
        "operator_memory": counted.operator,
    }


def _norm(arguments: dict[str, Any]) -> str:
    if arguments.get("post_norm"):
        return "post"
    return "pre, res-post" if arguments.get("res_post_norm") else "pre"
