"""Where experts live: greedy placement from a moving average of loads, and replication by the policy of EPLB.

Every function treats layers as rows and works on all of them at once; only the loop over experts is sequential.
Sources: load prediction, period and threshold of Pangu Ultra MoE (2505.04519); replication policy of deepseek-ai/EPLB
(2412.19437), our own code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tenfold.core.console import UserError


def check_loads(loads: np.ndarray, where: str = "loads") -> np.ndarray:
    """Loads as a finite, non-negative float array [..., experts]. Raises UserError naming the first bad entry."""
    loads = np.asarray(loads)
    if loads.ndim < 1 or loads.size == 0 or loads.dtype.kind not in "iufb":
        raise UserError(
            f"{where}: expected a non-empty array of numbers [layers, experts], found shape {loads.shape} of "
            f"{loads.dtype}"
        )
    values = loads.astype(np.float64)
    bad = ~np.isfinite(values) | (values < 0)
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise UserError(f"{where}: entry {place} is {values[place]}, expected a finite number of tokens, 0 or more")
    return values


def pack_balanced(weight: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Give items to packs of equal size, heaviest first, each to the lightest pack that has room (lowest index on
    ties).

    Args:
        weight: load of every item [layers, items].
        packs: number of packs; must divide the items.

    Returns:
        Pack of every item and its place inside the pack, both [layers, items] int64.

    Raises:
        UserError: packs does not divide the items.
    """
    rows, items = weight.shape
    if packs < 1 or items % packs:
        near = [n for n in range(1, items + 1) if items % n == 0]
        raise UserError(f"devices: {items} items do not divide over {packs}; valid: {', '.join(map(str, near))}")
    size = items // packs
    if size == 1:
        return np.tile(np.arange(packs), (rows, 1)), np.zeros((rows, items), dtype=np.int64)
    falling = np.argsort(-weight, axis=-1, kind="stable")
    sorted_weight = np.take_along_axis(weight, falling, axis=-1)
    load = np.zeros((rows, packs), dtype=weight.dtype)
    count = np.zeros((rows, packs), dtype=np.int64)
    every = np.arange(rows)
    pack = np.empty((rows, items), dtype=np.int64)
    place = np.empty((rows, items), dtype=np.int64)
    full = np.array(np.inf, dtype=weight.dtype if weight.dtype.kind == "f" else np.float64)
    for step in range(items):
        chosen = np.where(count < size, load, full).argmin(axis=1)
        item = falling[:, step]
        pack[every, item] = chosen
        place[every, item] = count[every, chosen]
        load[every, chosen] += sorted_weight[:, step]
        count[every, chosen] += 1
    return pack, place


def place_greedy(loads: np.ndarray, devices: int) -> np.ndarray:
    """Device of every expert by the greedy rule.

    Args:
        loads: tokens of every expert [experts] or [layers, experts].
        devices: devices that share the experts of a layer.

    Returns:
        Device index, same shape as `loads`.
    """
    values = check_loads(loads)
    rows = np.atleast_2d(values)
    if rows.shape[-1] == devices:
        # One expert a device: the heaviest still goes first, to the lowest free id.
        order = np.argsort(-rows, axis=-1, kind="stable")
        device = np.empty_like(order)
        np.put_along_axis(device, order, np.tile(np.arange(devices), (rows.shape[0], 1)), axis=-1)
        return device.reshape(values.shape)
    return pack_balanced(rows, devices)[0].reshape(values.shape)


def device_loads(loads: np.ndarray, device_of_expert: np.ndarray, devices: int) -> np.ndarray:
    """Tokens of every device [..., devices]."""
    rows, where = np.atleast_2d(loads), np.atleast_2d(device_of_expert)
    total = np.zeros((rows.shape[0], devices))
    np.add.at(total, (np.arange(rows.shape[0])[:, None], where), rows)
    return total.reshape(*np.shape(loads)[:-1], devices)


def variation(load: np.ndarray) -> np.ndarray:
    """Coefficient of variation (population standard deviation over mean) along the last axis; 0 where nothing is
    loaded."""
    mean = load.mean(axis=-1)
    return np.divide(load.std(axis=-1), mean, out=np.zeros_like(mean), where=mean > 0)


def fullness(load: np.ndarray) -> np.ndarray:
    """Largest load over the mean along the last axis; 1 where nothing is loaded."""
    mean = load.mean(axis=-1)
    return np.divide(load.max(axis=-1), mean, out=np.ones_like(mean), where=mean > 0)


@dataclass(frozen=True)
class Rebalance:
    """One check of the planner.

    Attributes:
        step: training step.
        migrated: whether each layer moved experts [layers].
        variation_before, variation_after: predicted coefficient of variation [layers].
        moved: experts that change device [layers].
    """

    step: int
    migrated: np.ndarray
    variation_before: np.ndarray
    variation_after: np.ndarray
    moved: np.ndarray


class PlacementPlanner:
    """Predicts loads by an exponential moving average and re-places experts when it pays.

    Args:
        layers, experts, devices: sizes; the first placement is consecutive experts per device.
        decay: weight of the past in the moving average.
        period: steps between checks.
        threshold: smallest fall of the coefficient of variation that is worth a migration.
    """

    def __init__(
        self, layers: int, experts: int, devices: int, decay: float = 0.9, period: int = 50, threshold: float = 0.08
    ) -> None:
        if devices < 1 or experts % devices:
            near = [n for n in range(1, experts + 1) if experts % n == 0]
            raise UserError(
                f"devices: {experts} experts do not divide over {devices}; valid: {', '.join(map(str, near))}"
            )
        self.devices, self.decay, self.period, self.threshold = devices, decay, period, threshold
        self.device_of_expert = np.tile(np.arange(experts) // (experts // devices), (layers, 1))
        self.predicted: np.ndarray | None = None
        self._step = 0

    def observe(self, loads: np.ndarray) -> Rebalance | None:
        """Take one step's tokens [layers, experts] (already averaged over data-parallel replicas); every `period`
        steps decide."""
        values = check_loads(loads)
        self.predicted = (
            values.copy() if self.predicted is None else self.decay * self.predicted + (1 - self.decay) * values
        )
        self._step += 1
        if self._step % self.period:
            return None
        proposal = place_greedy(self.predicted, self.devices)
        before = variation(device_loads(self.predicted, self.device_of_expert, self.devices))
        after = variation(device_loads(self.predicted, proposal, self.devices))
        migrate = before - after >= self.threshold
        moved = np.where(migrate, (proposal != self.device_of_expert).sum(axis=-1), 0)
        self.device_of_expert = np.where(migrate[:, None], proposal, self.device_of_expert)
        return Rebalance(self._step, migrate, before, after, moved)


@dataclass(frozen=True)
class Replication:
    """A placement with replicas.

    Attributes:
        physical_to_logical: expert of every slot [layers, replicas].
        logical_to_physical: slots of every expert, -1 where unused [layers, experts, most replicas].
        counts: replicas of every expert [layers, experts].
    """

    physical_to_logical: np.ndarray
    logical_to_physical: np.ndarray
    counts: np.ndarray


def _replicate(weight: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, experts = weight.shape
    expert = np.tile(np.arange(slots), (rows, 1))
    copy = np.zeros((rows, slots), dtype=np.int64)
    count = np.ones((rows, experts), dtype=np.int64)
    every = np.arange(rows)
    for slot in range(experts, slots):
        heaviest = (weight / count.astype(weight.dtype)).argmax(axis=-1)
        expert[:, slot] = heaviest
        copy[:, slot] = count[every, heaviest]
        count[every, heaviest] += 1
    return expert, copy, count


def replicate(loads: np.ndarray, replicas: int, groups: int, nodes: int, devices: int) -> Replication:
    """Replicate hot experts and balance them over devices.

    Hierarchical when nodes divide groups (expert groups are packed to nodes first, so group-limited routing stays
    inside a node), else global.

    Args:
        loads: tokens of every expert [layers, experts].
        replicas: slots over all devices; a multiple of devices.
        groups: expert groups of the router.
        nodes, devices: size of the expert-parallel group.

    Raises:
        UserError: sizes that do not divide; NaN or negative loads.
    """
    weight = np.atleast_2d(check_loads(loads)).astype(np.float32)
    layers, experts = weight.shape
    if replicas % devices or replicas < experts:
        near = -(-max(replicas, experts) // devices) * devices
        raise UserError(
            f"replicas: {replicas} for {experts} experts on {devices} devices: use a multiple of devices of at "
            f"least {experts}, nearest {near}"
        )
    if experts % groups:
        raise UserError(f"groups: {experts} experts do not divide into {groups} groups")
    if groups % nodes:
        groups = nodes = 1
    if devices % nodes:
        raise UserError(f"nodes: {devices} devices do not divide over {nodes} nodes")
    size, groups_per_node, per_device = experts // groups, groups // nodes, replicas // devices
    # Groups to nodes: `merged` numbers experts so that those of one node are consecutive.
    pack, place = pack_balanced(weight.reshape(layers, groups, size).sum(axis=-1), nodes)
    merged_of = (((pack * groups_per_node + place) * size)[..., None] + np.arange(size)).reshape(layers, experts)
    logical_of = np.argsort(merged_of, axis=-1)
    # Replicas inside a node.
    per_node = np.take_along_axis(weight, logical_of, axis=-1).reshape(-1, experts // nodes)
    expert, copy, count = _replicate(per_node, replicas // nodes)
    # Slots to the node's devices.
    slot_load = np.take_along_axis(per_node / count.astype(np.float32), expert, axis=-1)
    device, seat = pack_balanced(slot_load, devices // nodes)
    slot_of = np.argsort(device * per_device + seat, axis=-1)
    inside = np.take_along_axis(expert, slot_of, axis=-1).reshape(layers, nodes, -1)
    placed = (inside + np.arange(0, experts, experts // nodes)[None, :, None]).reshape(layers, -1)
    physical = np.take_along_axis(logical_of, placed, axis=-1)
    which = np.take_along_axis(copy, slot_of, axis=-1).reshape(layers, -1)
    counts = np.take_along_axis(count.reshape(layers, -1), merged_of, axis=-1)
    logical = np.full((layers, experts, int(counts.max())), -1, dtype=np.int64)
    logical[np.arange(layers)[:, None], physical, which] = np.arange(replicas)
    return Replication(physical, logical, counts)


def replicated_device_loads(loads: np.ndarray, placed: Replication, devices: int) -> np.ndarray:
    """Tokens of every device [layers, devices] when an expert's tokens are split evenly over its replicas."""
    share = np.atleast_2d(np.asarray(loads, dtype=np.float64)) / placed.counts
    slots = np.take_along_axis(share, placed.physical_to_logical, axis=-1)
    return slots.reshape(slots.shape[0], devices, -1).sum(axis=-1)


def balance_documents(lengths: np.ndarray, ranks: int) -> np.ndarray:
    """Rank of every packed document so that attention cost (length squared) is even: longest first, to the least
    loaded rank."""
    cost = check_loads(lengths, "lengths") ** 2
    load = np.zeros(ranks)
    rank_of = np.empty(len(cost), dtype=np.int64)
    for document in np.argsort(-cost, kind="stable"):
        rank_of[document] = load.argmin()
        load[rank_of[document]] += cost[document]
    return rank_of
