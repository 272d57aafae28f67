"""A deployment whose operations were measured: its rows by a profile, what the profile lacks by the roofline of the same devices."""

from __future__ import annotations

from armillary.core.errors import InputError
from armillary.models.graph.cost import Deployment
from armillary.models.graph.rows import Row
from armillary.sim.costs.profile import OPERATIONS, PACKAGED, Curve, Profile
from armillary.sim.costs.table import Measured, Table
from armillary.sim.operation import Axis, Kind


def profiled(deployment: Deployment, profile: Profile, *, host: float = 0.0, host_per_sequence: float = 0.0) -> Table:
    """The cost model. `host` ns an iteration are added. Raises InputError for what the profile was not measured for."""
    layers = _layers(deployment, profile)
    found: list[Measured] = []
    for work in deployment.works:
        for row in work.rows:
            if not covered(row):
                continue
            if row.axis is None:
                found.append(Measured(layers[row.name], 1.0, row.repeat))
            else:
                ((_, per_token),) = row.message_bytes.items()
                found.append(Measured(_collective(deployment, profile, row), float(per_token), row.repeat))
    rest = deployment.roofline(host=host, host_per_sequence=host_per_sequence, without=covered)
    name = f"{profile.name}, measured, of {deployment.model.name} on {deployment.layout.devices} x {deployment.device.name}; attention a roofline"
    return Table(name, found, rest)


def covered(row: Row) -> bool:
    """Whether profiles have an operation: they know the number of tokens, and neither what attention reads nor how many logits are wanted."""
    if row.gate != "always":
        return False
    if row.axis is not None:
        return (row.name, row.axis) in (("all_reduce", Axis.TENSOR), ("send", Axis.PIPELINE))
    return row.kind in (Kind.GEMM, Kind.MEMORY) and row.name in OPERATIONS


def _layers(deployment: Deployment, profile: Profile) -> dict[str, Curve]:
    model, layout, precision = deployment.model, deployment.layout, deployment.precision
    if (measured := PACKAGED.get(profile.name)) is not None and measured != deployment.device.name:
        raise InputError(
            f"the profile {profile.name} was measured on {measured}, the cluster has {deployment.device.name}",
            f"name a cluster of {measured}, or leave --profile for the roofline",
            field="profile",
        )
    shape = (model.num_heads, model.num_kv_heads, model.hidden_size, model.intermediate_size)
    if shape not in profile.layers or not model.gated or model.mixture is not None or model.latent is not None:
        known = ", ".join(f"{h} heads, {kv} of keys, {width} wide, {inner} inside" for h, kv, width, inner in sorted(profile.layers))
        raise InputError(
            f"the profile {profile.name} has no layer as {model.name}'s", f"it has: {known or 'none'}; leave --profile for the roofline",
            field="profile",
        )  # fmt: skip
    degrees = profile.layers[shape]
    if layout.tensor_parallel not in degrees or layout.sequence_parallel or layout.batch_attention:
        raise InputError(
            f"the profile {profile.name} was not measured for {model.name} over {layout.tensor_parallel} devices"
            + (" with sequence_parallel or batch_attention" if layout.tensor_parallel in degrees else ""),
            f"use tensor_parallel of {', '.join(map(str, sorted(degrees)))} alone, or leave --profile for the roofline",
            field="profile",
        )
    if not {precision.weights, precision.activations} <= {"fp16", "bf16"}:
        raise InputError(
            f"the profile {profile.name} is of 16-bit weights, not {precision.weights}",
            "use fp16, or leave --profile for the roofline",
            field="profile",
        )
    return dict(degrees[layout.tensor_parallel])


def _collective(deployment: Deployment, profile: Profile, row: Row) -> Curve:
    near = deployment.cluster.domain
    ranks = row.ranks
    each = min(ranks, near) if row.axis is Axis.TENSOR else (2 if deployment.layout.devices <= near else 1)
    curve = profile.collectives.get((row.name, ranks, each))
    if curve is None:
        raise InputError(
            f"the profile {profile.name} has no {row.name} among {ranks} devices, {each} in a node",
            "add a file of it, or leave --profile for the roofline",
            field="profile",
        )
    return curve
