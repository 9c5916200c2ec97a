"""Run a Pallas Mosaic GPU kernel's PTX on no GPU: all blocks' warps in turn, as the PTX manual says of each instruction.

What interpret mode can't show is shown here: the fragments in which wgmma takes and gives matrices, layouts made by hand, TMA descriptors, mbarrier
counts, and whether warps wait for each other for ever. It is no timing model. `late` picks when asynchronous work is done: as soon as it is
asked for, or as late as the waits in the program allow; or, with "readers", products and copies from shared memory late and copies to it at
once; or, with "writers", likewise, and a block's last warps, which copy and store, after the others. With these two, who waits for an arrival, a copy
or a barrier goes on before the warp that it waited for does anything more. A program that doesn't wait for what it needs can't be right with all of
them. What a thread stored in shared memory must have been fenced by that thread before TMA copies it, or writes there, or wgmma reads it; and a warp
must have fenced its copies since it looked at a counter before TMA reads what was stored in the arguments meanwhile.

Source: NVIDIA's PTX ISA 9.0: sections on wgmma, matrix descriptors, mbarrier, cp.async.bulk.tensor, stmatrix.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import ml_dtypes
import numpy as np

LANES = 32
_F32, _BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
_TYPES = {"b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "bf16": _BF16, "b32": np.uint32,
          "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f16": np.float16}


class Deadlock(Exception):
    """No warp of a block can go on."""


class Tensor(NamedTuple):
    """A TMA descriptor: which argument, sizes and strides in elements, the box that is copied, and its swizzle in bytes."""

    argument: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


class Launch(NamedTuple):
    """What the host does with a kernel: number of blocks and threads, the argument each parameter points to, None for that of the descriptors."""

    blocks: tuple[int, int, int]
    threads: int
    parameters: tuple[int | None, ...]
    tensors: dict[int, Tensor]  # by offset in bytes


def read_host(log: str) -> Launch:
    """Read the host's side from MOSAIC_GPU_DUMP_TO's `*.mlir-passes.log`."""
    text = log[log.rindex("gpu-launch-lowering") :].split("// -----//")[0]
    defined = dict(re.findall(r"^\s+(%[\w#]+) = (.*)$", text, re.MULTILINE))

    def number(name: str) -> int:
        value = re.match(r"llvm\.mlir\.constant\((-?\d+) ", defined[name])
        return int(value.group(1)) if value else number(re.search(r"%[\w#]+", defined[name]).group())

    def argument(name: str) -> int:
        """Follow a pointer back to the argument that it was loaded from."""
        kind, first, *rest = re.match(r"(\S+) (%[\w#]+)(?:, (%[\w#]+))?(\[[\d, ]+\])?", defined[name]).groups()
        if kind == "llvm.load":
            found = re.match(r"llvm\.getelementptr %[\w#]+\[(\d+)\]", defined.get(first, ""))
            return int(found.group(1)) if found else 0
        return argument(rest[0] if kind == "llvm.insertvalue" and rest[1] != "[1]" else first)

    def array(name: str) -> tuple[int, ...]:
        """Return what is stored in an array, as either jax 0.12 or jax 0.11 stores it."""
        name = re.escape(name)
        stored = [(number(index), number(value)) for value, index in re.findall(rf"memref\.store (%[\w#]+), {name}\[(%[\w#]+)\]", text)]
        for at, index in [(name, 0), *re.findall(rf"(%[\w#]+) = llvm\.getelementptr {name}\[(\d+)\]", text)]:
            stored += [(int(index), number(value)) for value in re.findall(rf"llvm\.store (%[\w#]+), {at} : i64", text)]
        return tuple(value for _, value in sorted(stored))

    tensors = {}
    for at in re.finditer(r"call @mosaic_gpu_init_tma_desc\((%[\w#]+), (%[\w#]+), %[\w#]+, %[\w#]+, %[\w#]+, %[\w#]+, (%[\w#]+),", text):
        offset = re.search(r"\[(\d+)\]", defined[at.group(1)]) if "getelementptr" in defined[at.group(1)] else None
        sizes, strides, box = (array(name) for name in re.findall(r"(%[\w#]+) = (?:memref|llvm)\.alloca\b", text[: at.start()])[-3:])
        tensors[int(offset.group(1)) if offset else 0] = Tensor(argument(at.group(2)), sizes, strides, box, number(at.group(3)))
    grid, block, given = re.search(r"launch_func.* blocks in \((.*?)\) threads in \((.*?)\).*? args\((.*?)\)", text).groups()
    parameters = (re.match(r"\s*(\S+) : (.*)", part).groups() for part in given.split(","))
    return Launch(tuple(number(name.strip()) for name in grid.split(",")), number(block.split(",")[0].strip()),
                  tuple(None if "array" in kind else argument(name) for name, kind in parameters), tensors)


class Program:
    """A kernel's PTX, taken apart: `steps`, a list of (predicate or None, whether it is negated, operation, operands)."""

    def __init__(self, ptx: str):
        body = ptx[ptx.index(".entry") :]
        self.parameters = re.findall(r"\.param [^\n]*?(\w+_param_\d+)", body[: body.index(")\n")])
        body = re.sub(r"//[^\n]*", "", body[body.index("\n{") + 2 :])
        body = re.sub(r"^\s*\.(loc|reg|shared|section|file|pragma)[^\n]*$", "", body, flags=re.MULTILINE)
        self.steps, self.labels = [], {}
        scopes, opened, at = [""], 0, 0
        while found := re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|([^;]*);)").match(body, at):
            at, (brace, label, statement) = found.end(), found.groups()
            if brace == "{":
                opened += 1
                scopes.append(f"@{opened}")
            elif brace:
                scopes.pop()
                if not scopes:
                    break
            elif label:
                self.labels[label if label.startswith("$") else label + scopes[-1]] = len(self.steps)
            elif statement and not statement.startswith(".reg"):
                self._add(statement, scopes[-1])

    def _add(self, text: str, scope: str) -> None:
        sign, predicate, operation, rest = re.match(r"(?:@(!?)(\S+)\s+)?(\S+)\s*(.*)", text.strip(), re.DOTALL).groups()
        operands = [part.strip() for part in re.findall(r"(?:\{[^{}]*\}|\[(?:[^\[\]{}]|\{[^{}]*\})*\]|[^,\[\]{}])+", rest)]
        if operation.startswith("bra"):
            operands = [operands[0] if operands[0].startswith("$") else operands[0] + scope]
        self.steps.append((predicate, sign == "!", operation, operands))


class Warp:
    def __init__(self, index: int):
        self.index, self.pc, self.registers = index, np.zeros(LANES, np.int64), {}
        self.parked = np.zeros(LANES, bool)  # lanes that are at a bar.sync before others of the warp
        self.products: list[list] = [[]]  # groups of wgmma, the last one open
        self.stores: list = []
        self.waiting = None  # for a bar.sync
        self.stored: list = []  # (lane, bytes of shared memory) not yet fenced
        self.on_their_way: list = []  # (address, bytes) stored in the arguments, which others needn't see yet
        self.polled = None  # (where, what) it last read of a counter
        self.reads_stored = False  # whether its copies may read what was stored in the arguments


class Machine:
    """One block of a kernel. arguments: numpy arrays, which are written in place; written: which of their bytes were, by any block."""

    def __init__(self, program: Program, launch: Launch, arguments: list[np.ndarray], block: tuple[int, int, int], *, late: bool | str, written=None):
        self.written = written or [np.zeros(argument.nbytes, bool) for argument in arguments]
        self.program, self.launch, self.block = program, launch, block
        self.late, self.loads_late, self.writers_last = bool(late), late is True, late == "writers"
        self.arguments = [argument.reshape(-1).view(np.uint8) for argument in arguments]
        self.itemsize = [argument.itemsize for argument in arguments]
        self.shared = np.random.default_rng(0).integers(0, 256, 1 << 18, np.uint8)  # nobody has cleaned up
        self.unfenced = np.zeros(len(self.shared), bool)  # stored by a thread, and not yet there for TMA and wgmma
        self.barriers: dict[int, list[int]] = {}  # address: [phase, arrivals still expected, arrivals of a phase, bytes still expected]
        self.loads: list = []
        self.named: dict[int, list[Warp]] = {}
        self.warps = [Warp(index) for index in range(launch.threads // LANES)]
        self.counts: dict[str, int] = {}

    def running(self) -> list[Warp]:
        """Return the warps that haven't ended. Raises AssertionError if none is left, but a copy to shared memory on its way."""
        running = [warp for warp in self.warps if warp.pc.min() < len(self.program.steps)]
        assert running or not self.loads, f"block {self.block}: {len(self.loads)} copies are left on their way"
        return running

    def turn(self, warp: Warp) -> bool:
        """Run a warp until it waits for somebody; return whether anything happened."""
        moved, end, looked = False, len(self.program.steps), False
        while warp.waiting is None and warp.pc.min() < end:
            pc = int(warp.pc[~warp.parked].min(initial=end))
            if pc == end:
                assert len({*warp.pc[warp.parked]}) == 1, "lanes of a warp wait at different barriers"
                pc, warp.parked[:] = int(warp.pc.min()), False
            active = warp.pc == pc
            predicate, negated, operation, operands = self.program.steps[pc]
            if operation.startswith("bar"):
                if (warp.pc[~active] < end).any():
                    warp.parked |= active
                    continue
                warp.parked[:] = False
            mask = active
            if predicate is not None:
                mask = active & (warp.registers[predicate] != negated)
            self.counts[operation] = self.counts.get(operation, 0) + 1
            warp.pc[active] = pc + 1
            if operation.startswith("bra"):
                warp.pc[mask] = self.program.labels[operands[0]]
            elif operation == "ret":
                warp.pc[mask] = end
            elif mask.any():
                instruction = getattr(self, f"_{operation.split('.')[0]}", None)
                if instruction is None:
                    raise NotImplementedError(f"{operation} {', '.join(operands)}")
                done = instruction(warp, mask, operation.split("."), operands)
                if done is False:  # a try_wait in vain: others go on, then it is asked again
                    warp.pc[active] = pc
                    return moved
                if operation.startswith("ld.relaxed"):  # likewise of a counter that is what it was
                    polled, warp.polled = warp.polled, (pc, *warp.registers[operands[0]][mask])
                    if polled == warp.polled:
                        return looked
                    looked = True
                if operation.startswith(("bar", "mbarrier.arrive", "cp.async.bulk.tensor")) and self.late and not self.loads_late:
                    return True  # who waited for it goes on before what this warp has begun is done
            moved = True
        return moved

    # Registers, immediates and addresses.

    def _get(self, warp: Warp, operand: str, dtype):
        dtype = np.dtype(dtype)
        if operand in warp.registers:
            value = warp.registers[operand]
            return value.view(dtype) if value.itemsize == dtype.itemsize else value.astype(f"u{dtype.itemsize}").view(dtype)
        if operand.startswith("0f"):
            return np.full(LANES, int(operand[2:], 16), np.uint32).view(dtype)
        if operand.startswith("%tid.x"):
            value = warp.index * LANES + np.arange(LANES)
        elif operand.startswith(("%tid", "%nctaid", "%ntid", "%ctaid", "%laneid")):
            dim = "xyz".index(operand[-1]) if operand[-2] == "." else 0
            value = {"%ctaid": self.block[dim], "%nctaid": self.launch.blocks[dim], "%ntid": (self.launch.threads, 1, 1)[dim], "%tid": 0,
                     "%laneid": np.arange(LANES)}[operand.split(".")[0]]
        elif operand.startswith("__"):
            value = 0  # shared memory begins there
        elif "_param_" in operand:
            value = _DESCRIPTORS
        elif re.fullmatch(r"-?\d+", operand):
            value = int(operand) & ((1 << 8 * dtype.itemsize) - 1)
        else:
            raise NotImplementedError(f"operand {operand}")
        return np.broadcast_to(np.asarray(value).astype(f"u{dtype.itemsize}"), LANES).view(dtype)

    def _set(self, warp: Warp, mask, operand: str, value) -> None:
        if operand == "_":
            return
        value = np.broadcast_to(value, LANES)
        old = warp.registers.get(operand)
        if old is None or old.itemsize != value.itemsize:
            warp.registers[operand] = np.array(value)
        else:
            warp.registers[operand] = np.where(mask, value, old.view(value.dtype))

    def _address(self, warp: Warp, operand: str):
        base, _, offset = operand.strip("[]").partition("+")
        wide = warp.registers[base].itemsize == 8 if base in warp.registers else True
        return self._get(warp, base, np.uint64 if wide else np.uint32).astype(np.int64) + int(offset or 0)

    def memory(self, address: int, count: int):
        """Return a view of `count` bytes: of shared memory, or of an argument by the address's upper half."""
        where, offset = divmod(int(address), 1 << 32)
        memory = self.shared if where == 0 else self.arguments[where - 1]
        if not 0 <= offset <= len(memory) - count:
            raise IndexError(f"{count} bytes at {offset} of {len(memory)} in {'shared memory' if where == 0 else f'argument {where - 1}'}")
        return memory[offset : offset + count]

    # Instructions.

    def _binary(self, warp, mask, parts, operands, function):
        if parts[-1] == "bf16x2":
            pairs = (self._get(warp, operand, np.uint32).copy().view(_BF16).astype(np.float32) for operand in operands[1:])
            return self._set(warp, mask, operands[0], function(*pairs).astype(_BF16).view(np.uint32))
        dtype = _TYPES[parts[-1]]
        result = function(*(self._get(warp, operand, dtype) for operand in operands[1:]))
        self._set(warp, mask, operands[0], result.astype(dtype))

    def _mov(self, warp, mask, parts, operands):
        dtype = _TYPES[parts[-1]] if parts[-1] != "pred" else bool
        target, source = operands
        if source.startswith("{"):
            pieces = [piece.strip() for piece in source.strip("{}").split(",")]
            each = np.dtype(f"u{np.dtype(dtype).itemsize // len(pieces)}")
            value = np.stack([self._get(warp, piece, each) for piece in pieces], axis=-1).copy().view(dtype)[:, 0]
            self._set(warp, mask, target, value)
        elif target.startswith("{"):
            pieces = [piece.strip() for piece in target.strip("{}").split(",")]
            value = self._get(warp, source, dtype).copy().view(f"u{np.dtype(dtype).itemsize // len(pieces)}").reshape(LANES, -1)
            for index, piece in enumerate(pieces):
                self._set(warp, mask, piece, value[:, index])
        else:
            self._set(warp, mask, target, _predicates(warp, source) if dtype is bool else self._get(warp, source, dtype))

    def _cvta(self, warp, mask, parts, operands):
        self._set(warp, mask, operands[0], self._get(warp, operands[1], np.uint64))

    def _add(self, *step):
        self._binary(*step, np.add)

    def _sub(self, *step):
        self._binary(*step, np.subtract)

    def _mul(self, warp, mask, parts, operands):
        if parts[1] in ("wide", "hi"):
            dtype = np.dtype(_TYPES[parts[-1]])
            a, b = (self._get(warp, operand, dtype).astype(object if dtype.itemsize == 8 else f"{dtype.kind}{2 * dtype.itemsize}")
                    for operand in operands[1:])
            value = a * b
            return self._set(warp, mask, operands[0], value if parts[1] == "wide" else (value >> 8 * dtype.itemsize).astype(dtype))
        self._binary(warp, mask, parts, operands, np.multiply)

    def _mad(self, *step):
        self._binary(*step, lambda a, b, c: a * b + c)

    def _fma(self, warp, mask, parts, operands):
        a, b, c = (self._get(warp, operand, np.float32).astype(np.float64) for operand in operands[1:])
        exact = a * b + c
        value = exact.astype(np.float32)
        if "rm" in parts:
            value = np.where(value > exact, np.nextafter(value, np.float32(-np.inf)), value)
        self._set(warp, mask, operands[0], value.astype(np.float32))

    def _div(self, *step):
        self._binary(*step, np.divide)

    def _ex2(self, *step):
        self._binary(*step, np.exp2)

    def _rsqrt(self, *step):
        self._binary(*step, lambda x: 1 / np.sqrt(x))

    def _lg2(self, *step):
        self._binary(*step, np.log2)

    def _neg(self, *step):
        self._binary(*step, np.negative)

    def _min(self, *step):
        self._binary(*step, np.minimum if "NaN" in step[2] else np.fmin)

    def _max(self, *step):
        self._binary(*step, np.maximum if "NaN" in step[2] else np.fmax)

    def _and(self, *step):
        self._logic(*step, np.bitwise_and)

    def _or(self, *step):
        self._logic(*step, np.bitwise_or)

    def _xor(self, *step):
        self._logic(*step, np.bitwise_xor)

    def _not(self, *step):
        self._logic(*step, np.bitwise_not)

    def _logic(self, warp, mask, parts, operands, function):
        if parts[-1] != "pred":
            return self._binary(warp, mask, parts, operands, function)
        self._set(warp, mask, operands[0], function(*(_predicates(warp, operand) for operand in operands[1:])))

    def _shl(self, warp, mask, parts, operands):
        self._shift(warp, mask, parts, operands, np.left_shift)

    def _bfe(self, warp, mask, parts, operands):
        first, count = (int(operand) for operand in operands[2:])
        self._binary(warp, mask, parts, operands[:2], lambda x: x << x.dtype.type(8 * x.itemsize - first - count) >> x.dtype.type(8 * x.itemsize - count))

    def _shr(self, warp, mask, parts, operands):
        self._shift(warp, mask, parts, operands, np.right_shift)

    def _shift(self, warp, mask, parts, operands, function):
        dtype = np.dtype(_TYPES[parts[-1]])
        value, count = self._get(warp, operands[1], dtype), self._get(warp, operands[2], np.uint32)
        bits = 8 * dtype.itemsize
        shifted = function(value, np.minimum(count, bits - 1).astype(dtype))
        beyond = np.where(value < 0, -1, 0).astype(dtype) if parts[0] == "shr" else np.zeros(LANES, dtype)
        self._set(warp, mask, operands[0], np.where(count >= bits, beyond, shifted).astype(dtype))

    def _shf(self, warp, mask, parts, operands):
        low, high, count = (self._get(warp, operand, np.uint32).astype(np.uint64) for operand in operands[1:])
        both, count = high << np.uint64(32) | low, count & np.uint64(31) if parts[2] == "wrap" else np.minimum(count, 32)
        value = both << count >> np.uint64(32) if parts[1] == "l" else both >> count
        self._set(warp, mask, operands[0], value.astype(np.uint32))

    def _prmt(self, warp, mask, parts, operands):
        low, high, selector = (self._get(warp, operand, np.uint32) for operand in operands[1:])
        from_bytes = np.stack([low, high], axis=-1).copy().view(np.uint8)
        each = np.stack([selector >> np.uint32(4 * index) & np.uint32(15) for index in range(4)], axis=-1)
        value = np.take_along_axis(from_bytes, (each & 7).astype(np.int64), axis=1)
        signs = np.where(value & 128, np.uint8(255), np.uint8(0))  # of a byte, in place of it
        self._set(warp, mask, operands[0], np.where(each & 8, signs, value).astype(np.uint8).view(np.uint32)[:, 0])

    def _setp(self, warp, mask, parts, operands):
        a, b = (self._get(warp, operand, _TYPES[parts[-1]]) for operand in operands[1:3])
        value = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}[parts[1]](a, b)
        if parts[1] == "ne" and value.dtype == bool and a.dtype.kind == "f":
            value &= ~(np.isnan(a) | np.isnan(b))  # an ordered comparison
        if len(operands) == 4:
            value = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[parts[2]](value, warp.registers[operands[3]])
        self._set(warp, mask, operands[0], value)

    def _selp(self, warp, mask, parts, operands):
        dtype = _TYPES[parts[-1]]
        a, b = (self._get(warp, operand, dtype) for operand in operands[1:3])
        self._set(warp, mask, operands[0], np.where(warp.registers[operands[3]], a, b))

    def _cvt(self, warp, mask, parts, operands):
        target, source = parts[-2:]
        if target == "bf16x2":
            high, low = (self._get(warp, operand, np.float32).astype(_BF16).view(np.uint16) for operand in operands[1:])
            value = np.stack([low, high], axis=-1).copy().view(np.uint32)[:, 0]
        else:
            value = self._get(warp, operands[1], _TYPES[source])
            if "sat" in parts:
                value = np.nan_to_num(np.clip(value, 0, 1))
            if target[0] in "us" and source[0] == "f":
                value = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[parts[1]](value)
            value = value.astype(_TYPES[target])
        self._set(warp, mask, operands[0], value)

    # Memory.

    def _ld(self, warp, mask, parts, operands):
        if parts[1].startswith("param"):
            where = self.program.parameters.index(operands[1].strip("[]"))
            value = self.launch.parameters[where] + 1 << 32
            return self._set(warp, mask, operands[0], np.full(LANES, value, np.uint64))
        dtype = np.dtype(_TYPES[parts[-1]])
        names = [name.strip() for name in operands[0].strip("{}").split(",")]
        address = self._address(warp, operands[1])
        warp.reads_stored &= parts[1] != "relaxed"
        if warp.on_their_way and {*address[mask].tolist()} & {int(stored) for stored, _ in warp.on_their_way}:
            self.deliver(warp)
        values = np.zeros((LANES, len(names)), dtype)
        for lane in np.flatnonzero(mask):
            values[lane] = self.memory(address[lane], len(names) * dtype.itemsize).view(dtype)
        for index, name in enumerate(names):
            self._set(warp, mask, name, values[:, index])

    def _st(self, warp, mask, parts, operands):
        dtype = np.dtype(_TYPES[parts[-1]])
        address = self._address(warp, operands[0])
        values = np.stack([self._get(warp, name.strip(), dtype) for name in operands[1].strip("{}").split(",")], axis=-1)
        for lane in np.flatnonzero(mask):
            self._store(warp, lane, address[lane], values[lane])

    def _red(self, warp, mask, parts, operands):
        assert parts[1:] == ["release", "gpu", "global", "add", "u32"], parts
        address, value = self._address(warp, operands[0]), self._get(warp, operands[1], np.uint32)
        self.deliver(warp)
        for lane in np.flatnonzero(mask):
            self.memory(address[lane], 4).view(np.uint32)[:] += value[lane]

    def _atom(self, warp, mask, parts, operands):
        assert parts[1:] == ["relaxed", "gpu", "global", "add", "u32"], parts
        address, value, before = self._address(warp, operands[1]), self._get(warp, operands[2], np.uint32), np.zeros(LANES, np.uint32)
        for lane in np.flatnonzero(mask):
            word = self.memory(address[lane], 4).view(np.uint32)
            before[lane] = word[0]
            word += value[lane]
        self._set(warp, mask, operands[0], before)

    def _stmatrix(self, warp, mask, parts, operands):
        assert mask.all() and "m8n8" in parts
        address = self._address(warp, operands[0])
        for index, name in enumerate(operands[1].strip("{}").split(",")):
            matrix = self._get(warp, name.strip(), np.uint32).copy().view(np.uint16).reshape(8, 8)
            for row in range(8):
                self._store(warp, 8 * index + row, address[8 * index + row], matrix[:, row] if "trans" in parts else matrix[row])

    def _ldmatrix(self, warp, mask, parts, operands):
        assert mask.all() and "m8n8" in parts
        address = self._address(warp, operands[1])
        for index, name in enumerate(operands[0].strip("{}").split(",")):
            matrix = np.stack([self.memory(address[8 * index + row], 16).view(np.uint16) for row in range(8)])
            self._set(warp, mask, name.strip(), np.ascontiguousarray(matrix.T if "trans" in parts else matrix).view(np.uint32).reshape(LANES))

    def _store(self, warp, lane: int, address, values) -> None:
        values = np.ascontiguousarray(values).view(np.uint8)
        if address >= len(self.shared) and self.late:
            warp.on_their_way.append((address, values))
        else:
            self.memory(address, len(values))[:] = values
        if address < len(self.shared):
            stored = slice(int(address), int(address) + len(values))
            self.unfenced[stored] = True
            warp.stored.append((lane, stored))
        else:
            argument, offset = divmod(int(address), 1 << 32)
            self.written[argument - 1][offset : offset + len(values)] = True

    def deliver(self, warp) -> None:
        """Let others see what a warp stored in the arguments."""
        for address, values in warp.on_their_way:
            self.memory(address, len(values))[:] = values
        warp.on_their_way = []

    def _fence(self, warp, mask, parts, operands):
        if parts[1:3] != ["proxy", "async"]:
            return
        if parts[3:] != ["shared::cta"]:
            assert mask.all(), "a fence of some lanes"
            warp.reads_stored = True
        if parts[3:] == ["global"]:
            return
        for lane, stored in warp.stored:
            if mask[lane]:
                self.unfenced[stored] = False
        warp.stored = [(lane, stored) for lane, stored in warp.stored if not mask[lane]]

    def fenced(self, address) -> None:
        """Assert that bytes of shared memory may be read or written otherwise than by a thread's loads and stores."""
        assert not self.unfenced[address].any(), "shared memory that was stored to and not fenced since"

    def _prefetch(self, *_):
        pass

    _setmaxnreg = _prefetch

    # Between lanes and warps.

    def _elect(self, warp, mask, parts, operands):
        lane, predicate = operands[0].split("|")
        leader = int(np.flatnonzero(mask)[0])
        self._set(warp, mask, lane, np.full(LANES, leader, np.uint32))
        self._set(warp, mask, predicate, np.arange(LANES) == leader)

    def _shfl(self, warp, mask, parts, operands):
        assert mask.all(), "shfl.sync of some lanes"
        value, by, clamp = (self._get(warp, operand, np.uint32) for operand in operands[1:4])
        lane = np.arange(LANES)
        last, segment = (clamp & 31).astype(np.int64), (clamp >> 8 & 31).astype(np.int64)
        largest = lane & segment | last & ~segment
        by = by.astype(np.int64)
        source = {"idx": lane & segment | by & ~segment, "bfly": lane ^ by, "down": lane + by, "up": lane - by}[parts[2]]
        valid = source >= largest if parts[2] == "up" else source <= largest
        first, _, predicate = operands[0].partition("|")
        self._set(warp, mask, first, value[np.where(valid, source, lane)])
        if predicate:
            self._set(warp, mask, predicate, valid)

    def _bar(self, warp, mask, parts, operands):
        self.deliver(warp)
        index = int(self._get(warp, operands[0], np.uint32)[0])
        most = int(self._get(warp, operands[1], np.uint32)[0]) if len(operands) > 1 else self.launch.threads
        here = self.named.setdefault(index, [])
        here.append(warp)
        warp.waiting = index
        if len(here) * LANES == most:
            for other in self.named.pop(index):
                other.waiting = None

    def _mbarrier(self, warp, mask, parts, operands):
        if parts[1] == "init":
            for lane in np.flatnonzero(mask):
                count = int(self._get(warp, operands[1], np.uint32)[lane])
                self.barriers[int(self._address(warp, operands[0])[lane])] = [0, count, count, 0]
        elif parts[1] == "arrive":
            address, count = self._address(warp, operands[1]), self._get(warp, operands[2], np.uint32) if len(operands) > 2 else np.ones(LANES, int)
            for lane in np.flatnonzero(mask):
                bytes_, arrivals = (int(count[lane]), 1) if "expect_tx" in parts else (0, int(count[lane]))
                self._arrive(int(address[lane]), arrivals, bytes_)
        elif parts[1] == "try_wait":
            lane = int(np.flatnonzero(mask)[0])
            parity = int(self._get(warp, operands[2], np.uint32)[lane])
            done = self.barriers[int(self._address(warp, operands[1])[lane])][0] % 2 != parity
            self._set(warp, mask, operands[0], np.full(LANES, done))
            return done
        else:
            raise NotImplementedError(".".join(parts))

    def _arrive(self, address: int, arrivals: int, bytes_: int) -> None:
        state = self.barriers[address]
        state[1] -= arrivals
        state[3] += bytes_
        assert state[1] >= 0, f"more arrivals than the barrier at {address} expects"
        if state[1] == 0 and state[3] == 0:
            state[0], state[1] = state[0] + 1, state[2]

    # TMA.

    def _cp(self, warp, mask, parts, operands):
        if "commit_group" in parts:
            return
        if "wait_group" in parts:
            if "read" in parts:
                warp.stores = [copy.read() for copy in warp.stores]
            else:
                for copy in warp.stores:
                    copy.store()
                warp.stores = []
            return
        assert parts[2] == "bulk", parts
        loads = next(part for part in parts if part.startswith(("global", "shared"))) != "global"  # the target comes first
        for lane in np.flatnonzero(mask):
            if "tensor" in parts:
                tensor_at, shared_at = (operands[1], operands[0]) if loads else operands[:2]
                descriptor, coordinates = re.match(r"\[(\S+),\s*\{(.*)\}\s*\]", tensor_at).groups()
                tensor = self.launch.tensors[int(self._get(warp, descriptor, np.uint64)[lane]) - _DESCRIPTORS]
                start = [int(self._get(warp, part.strip(), np.int32)[lane]) for part in coordinates.split(",")][::-1]
                copy = _Box(self, tensor, start, int(self._address(warp, shared_at)[lane]))
            else:
                target, source = (int(self._address(warp, operand)[lane]) for operand in operands[:2])
                copy = _Bytes(self, target, source, int(self._get(warp, operands[2], np.uint32)[lane]))
            self.fenced(copy.in_shared)
            argument, bytes_ = copy.in_memory
            if loads:
                assert warp.reads_stored or not self.written[argument][bytes_].any(), "a copy of what was stored and not fenced since"
                barrier = int(self._address(warp, operands[-1])[lane])

                def load(copy=copy, barrier=barrier):
                    copy.load()
                    self._arrive(barrier, 0, -copy.bytes)

                self.loads.append(load) if self.loads_late else load()
                continue
            self.written[argument][bytes_] = True
            warp.stores.append(copy) if self.late else copy.store()

    # Matrix products.

    def _mma(self, warp, mask, parts, operands):
        assert mask.all() and parts[1:] == ["sync", "aligned", "m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"], parts
        result, a, b, c = ([name.strip() for name in operand.strip("{}").split(",")] for operand in operands)
        lane, product = np.arange(LANES), self._fragment(warp, a, 16) @ self._fragment(warp, b, 8).T
        sums = [self._get(warp, name, np.float32) + product[lane // 4 + 8 * (index // 2), lane % 4 * 2 + index % 2] for index, name in enumerate(c)]
        for name, value in zip(result, sums):
            self._set(warp, mask, name, value.astype(np.float32))

    def _fragment(self, warp, names, rows: int):
        """Return a warp's part of an operand of 16 inputs, float32 [rows, 16], 16 or 8 rows."""
        matrix, lane, eights = np.zeros((rows, 16), np.float32), np.arange(LANES), rows // 8
        for index, name in enumerate(names):
            word = self._get(warp, name, np.uint32).copy().view(_BF16).reshape(LANES, 2)
            for half in range(2):
                matrix[lane // 4 + 8 * (index % eights), lane % 4 * 2 + half + 8 * (index // eights)] = word[:, half]
        return matrix

    def _wgmma(self, warp, mask, parts, operands):
        assert mask.all()
        if parts[1] == "commit_group":
            warp.products.append([])
        elif parts[1] == "wait_group":
            keep = int(operands[0])
            done = len(warp.products) - 1 - keep
            for group in warp.products[: max(done, 0)]:
                for multiply in group:
                    multiply()
            del warp.products[: max(done, 0)]
        elif parts[1] == "mma_async":
            multiply = self._product(warp, parts, operands)
            warp.products[-1].append(multiply) if self.late else multiply()

    def _product(self, warp, parts, operands):
        m, n, k = map(int, re.match(r"m(\d+)n(\d+)k(\d+)", next(part for part in parts if part.startswith("m64"))).groups())
        assert (m, k) == (64, 16) and parts[-3:] == ["f32", "bf16", "bf16"], parts
        sums, a, b, accumulate, scale_a, scale_b, *transposed = operands
        sums = [name.strip() for name in sums.strip("{}").split(",")]
        assert len(sums) == n // 2 and (scale_a, scale_b) == ("1", "1")
        lane = np.arange(LANES)
        if a.startswith("{"):
            mine = self._fragment(warp, [name.strip() for name in a.strip("{}").split(",")], 16)
            transposed = ["0", *transposed]
        left = None if a.startswith("{") else self._in_shared(int(self._get(warp, a, np.uint64)[0]), 64, transposed[0] == "1")
        right = self._in_shared(int(self._get(warp, b, np.uint64)[0]), n, transposed[1] == "1")
        fresh = not bool(warp.registers[accumulate][0])

        def multiply():
            rows = mine if left is None else self._matrix(left)[16 * (warp.index % 4) :][:16]
            product = rows @ self._matrix(right).T
            for index, name in enumerate(sums):
                part = product[lane // 4 + 8 * (index // 2 % 2), lane % 4 * 2 + index % 2 + 8 * (index // 4)]
                before = np.float32(0) if fresh else self._get(warp, name, np.float32)
                self._set(warp, np.ones(LANES, bool), name, (before + part).astype(np.float32))

        return multiply

    def _in_shared(self, descriptor: int, rows: int, transposed: bool):
        """Return the addresses in shared memory of the matrix [rows, 16] that a descriptor means."""
        start, leading, stride = ((descriptor >> bit & 0x3FFF) * 16 for bit in (0, 16, 32))
        width = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62]
        row, k = np.indices((rows, 16))
        if transposed:
            across, along = row, k
        else:
            across, along = k, row
        each = width // 2  # elements of a swizzled line
        if width == 16:
            assert not transposed, "an unswizzled transposed operand"
            address = start + along // 8 * stride + along % 8 * 16 + across // 8 * leading + across % 8 * 2
        elif transposed:
            address = start + across // each * leading + along // 8 * stride + along % 8 * width + across % each * 2
        else:
            address = start + along // 8 * stride + along % 8 * width + across * 2
        address = _swizzled(address, width)
        self.fenced(address)
        return address

    def _matrix(self, address):
        return self.shared.view(np.uint16)[address // 2].view(_BF16).astype(np.float32)


_DESCRIPTORS = 1 << 60


def _predicates(warp: Warp, operand: str):
    """Return each lane's predicate, in a register or constant."""
    return warp.registers[operand] if operand in warp.registers else np.full(LANES, operand != "0")


def _swizzled(address, width: int):
    """Exchange 16-byte pieces as a swizzle of `width` bytes does, which goes by the address."""
    bits = {16: 0, 32: 1, 64: 3, 128: 7}[width]
    return address ^ ((address >> 7 & bits) << 4)


class _Box:
    """A box between an argument and shared memory; what lies outside the tensor is zeros, or isn't written."""

    def __init__(self, machine: Machine, tensor: Tensor, start, shared: int):
        size = machine.itemsize[tensor.argument]
        index = np.indices(tensor.box).reshape(len(tensor.box), -1).T + np.asarray(start)
        self.inside = ((index >= 0) & (index < np.asarray(tensor.sizes))).all(axis=1)
        self.outer = (index @ np.asarray(tensor.strides))[self.inside]
        inner = _swizzled(shared + np.arange(len(index)) * size, max(tensor.swizzle, 16))
        assert shared % 128 == 0 or tensor.swizzle <= 16, f"TMA to or from shared memory at {shared}, expected a multiple of 128"
        dtype = f"u{size}"
        self.in_shared = inner[self.inside]
        self.inner, self.bytes = inner // size, len(index) * size
        self.argument, self.shared = machine.arguments[tensor.argument].view(dtype), machine.shared.view(dtype)
        self.in_memory = tensor.argument, (self.outer[:, None] * size + np.arange(size)).ravel()
        self.values = None

    def load(self) -> None:
        values = np.zeros(len(self.inner), self.argument.dtype)
        values[self.inside] = self.argument[self.outer]
        self.shared[self.inner] = values

    def read(self):
        """Take what is to be stored."""
        if self.values is None:
            self.values = self.shared[self.inner[self.inside]]
        return self

    def store(self) -> None:
        self.argument[self.outer] = self.read().values


class _Bytes:
    """Bytes in a row, from anywhere to anywhere."""

    def __init__(self, machine: Machine, target: int, source: int, count: int):
        assert not (target | source | count) % 16, f"a copy of {count} bytes from {source} to {target}, expected multiples of 16"
        self.target, self.source, self.bytes, self.values = machine.memory(target, count), machine.memory(source, count), count, None
        shared, (argument, offset) = min(target, source), divmod(max(target, source), 1 << 32)  # arguments are above it
        self.in_shared, self.in_memory = slice(shared, shared + count), (argument - 1, slice(offset, offset + count))

    def read(self):
        """Take what is to be stored."""
        if self.values is None:
            self.values = self.source.copy()
        return self

    def store(self) -> None:
        self.target[:] = self.read().values

    load = store


@np.errstate(all="ignore")
def run_together(machines: list[Machine]) -> None:
    """Run blocks to their ends. Raises Deadlock; AssertionError if a copy to shared memory is on its way after that.

    Late, warps take turns, and the copy that was asked for last comes first; otherwise one runs only where none behind it can, with "writers" none
    before it, so that who doesn't wait for the last of all is found out.
    """
    turns, writers_last = sum if machines[0].loads_late else any, machines[0].writers_last
    while running := [(machine, warp) for machine in machines for warp in machine.running()]:
        if not turns(machine.turn(warp) for machine, warp in (running if writers_last else reversed(running))):
            loads = next((machine.loads for machine in machines if machine.loads), None)
            if loads is None:
                waiting = [(machine.block, warp.index, machine.program.steps[warp.pc.min()][2]) for machine, warp in running]
                raise Deadlock(f"blocks' warps at {waiting}")
            loads.pop()()
    for machine in machines:
        for warp in machine.warps:
            machine.deliver(warp)
            for copy in warp.stores:  # a block may end before what was read of it has arrived
                assert copy.values is not None, f"block {machine.block}: ended before what it stores was read"
                copy.store()


def run(ptx: str, log: str, arguments: list[np.ndarray], *, late: bool | str) -> dict[str, int]:
    """Run all blocks of a kernel together on its arguments, outputs last, which are written. Returns how often each operation ran."""
    program, launch = Program(ptx), read_host(log)
    written = [np.zeros(argument.nbytes, bool) for argument in arguments]
    machines = [Machine(program, launch, arguments, (x, y, z), late=late, written=written) for z, y, x in np.ndindex(*launch.blocks[::-1])]
    run_together(machines)
    counts: dict[str, int] = {}
    for machine in machines:
        for name, count in machine.counts.items():
            counts[name] = counts.get(name, 0) + count
    return counts
