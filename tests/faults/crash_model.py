"""States that a crash may leave on disk, derived from the recorded operations of a real run.

The model is that of ALICE (OSDI 2014). A change of a folder's entries is durable when the folder is synced after it. Until then any subset
of such changes may have happened; a rename happens completely or not at all. The content of a file is durable when the file is synced.
Until then it may be empty, cut in half, complete, or junk.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cbqstream.disk import Disk

PREFIXES, SUBSETS = 6, 8
"""Numbers of prefixes without the newest changes, and of random subsets, that are tried for the changes that are not durable."""
DATA = ("empty", "half", "full", "junk")
"""Contents that a file that was not synced may have."""


@dataclass(frozen=True)
class Event:
    """One change of the file system, or one sync. Paths are relative to the folder that the recorder watches."""

    kind: str
    path: str
    content: bytes = b""
    target: str = ""


class Recorder(Disk):
    """A disk that performs the operations and records the events of each one.

    Args:
        base: folder that is watched; it contains every path.
    """

    def __init__(self, base: Path) -> None:
        super().__init__()
        self.base = base
        self.events: list[Event] = []

    def _add(self, kind: str, path: Path, content: bytes = b"", target: Path | None = None) -> None:
        self.events.append(Event(kind, self._name(path), content, "" if target is None else self._name(target)))

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.base))

    def note_lock(self, run: Path) -> None:
        """Record the creation of the lock file, which filelock makes without the disk."""
        lock = Event("create", self._name(run / "LOCK"))
        if (run / "LOCK").exists() and lock not in self.events:
            self.events.append(lock)

    def make_folder(self, path):
        self.note_lock(path.parent)
        super().make_folder(path)
        self._add("mkdir", path)

    def write(self, path, chunks, *, mode=0o600):
        content = b"".join(bytes(chunk) for chunk in chunks)
        digest = super().write(path, [content], mode=mode)
        self._add("create", path, content)
        self._add("fsync", path)
        return digest

    def write_plain(self, path, chunks):
        content = b"".join(bytes(chunk) for chunk in chunks)
        super().write_plain(path, [content])
        self._add("create", path, content)
        self._add("fsync", path)

    def replace(self, path, chunks):
        content = b"".join(bytes(chunk) for chunk in chunks)
        super().replace(path, [content])
        self._add("create", path, content)

    def sync_folder(self, path):
        self.note_lock(path)
        super().sync_folder(path)
        self._add("fsyncdir", path)

    def rename(self, source, target):
        super().rename(source, target)
        self._add("rename", source, target=target)

    def _put(self, source, target):
        super()._put(source, target)
        self._add("rename", source, target=target)

    def link_or_copy(self, source, target):
        super().link_or_copy(source, target)
        self._add("link", source, target=target)

    def remove_file(self, path):
        super().remove_file(path)
        self._add("unlink", path)

    def remove_tree(self, path):
        self.note_lock(path.parent)
        entries = sorted(path.rglob("*"), reverse=True) if path.exists() else []
        existed = path.exists()
        super().remove_tree(path)
        for entry in [*entries, *([path] if existed else [])]:
            self._add("unlink", entry)


@dataclass
class Node:
    """A file, or a folder if `entries` is not None. It does not know its name."""

    entries: dict[str, "Node"] | None = None
    content: bytes = b""
    synced: bool = False


@dataclass
class Change:
    """Entries of folders that are set, or deleted (None), in one step. The change is durable when `folder` is synced."""

    folder: Node
    entries: list[tuple[Node, str, Node | None]] = field(default_factory=list)


class World:
    """A file system: the state that the running system reads, the durable state, and the changes between the two."""

    def __init__(self) -> None:
        self.now = Node(entries={})
        self.durable: dict[int, dict[str, Node]] = {id(self.now): {}}
        self.pending: list[Change] = []

    def find(self, path: str) -> tuple[Node, str, Node | None]:
        """The folder of a path, the name in that folder, and the node that has the name now (None if there is none)."""
        *folders, name = [part for part in Path(path).parts if part != "."] or [""]
        node = self.now
        for folder in folders:
            node = node.entries[folder]
        return (node, name, node.entries.get(name)) if name else (node, "", node)

    def apply(self, event: Event) -> None:
        """Apply one event."""
        if event.kind == "nothing":
            return
        parent, name, node = self.find(event.path)
        if event.kind in ("mkdir", "create"):
            self._set(parent, [(parent, name, Node({} if event.kind == "mkdir" else None, event.content))])
        elif event.kind == "fsync":
            node.synced = True
        elif event.kind == "fsyncdir":
            durable, rest = [], []
            for change in self.pending:
                (durable if change.folder is node else rest).append(change)
            for change in durable:
                _apply(self.durable, change)
            self.pending = rest
        elif event.kind == "unlink":
            if node is not None:
                self._set(parent, [(parent, name, None)])
        else:
            to, new_name, _ = self.find(event.target)
            away = [(parent, name, None)] if event.kind == "rename" else []
            self._set(to, [(to, new_name, node), *away])

    def _set(self, folder: Node, entries: list[tuple[Node, str, Node | None]]) -> None:
        for parent, name, node in entries:
            if node is None:
                parent.entries.pop(name, None)
            else:
                parent.entries[name] = node
                self.durable.setdefault(id(node), {})
        self.pending.append(Change(folder, entries))

    def crash_states(self, chance: random.Random) -> Iterator[dict[str, bytes | None]]:
        """Generate the states that a crash at this moment may leave: content of each file by path, and None for each folder."""
        count = len(self.pending)
        chosen = {frozenset(), frozenset(range(count))}
        chosen |= {frozenset(range(count - missing)) for missing in range(1, min(PREFIXES, count) + 1)}
        chosen |= {frozenset(index for index in range(count) if chance.random() < 0.5) for _ in range(SUBSETS)}
        for subset in sorted(chosen, key=sorted):
            tables = {key: dict(entries) for key, entries in self.durable.items()}
            for index in sorted(subset):
                _apply(tables, self.pending[index])
            for data in DATA:
                state: dict[str, bytes | None] = {}
                torn = _walk(self.now, tables, "", data, state)
                yield state
                if not torn:
                    break


def _apply(tables: dict[int, dict[str, Node]], change: Change) -> None:
    for parent, name, node in change.entries:
        if node is None:
            tables[id(parent)].pop(name, None)
        else:
            tables[id(parent)][name] = node


def _walk(node: Node, tables: dict[int, dict[str, Node]], path: str, data: str, state: dict[str, bytes | None]) -> bool:
    """Add the tree below `node` to `state`. Returns whether the content of a file in it is not durable."""
    torn = False
    for name, child in sorted(tables[id(node)].items()):
        below = f"{path}/{name}" if path else name
        if child.entries is not None:
            state[below] = None
            torn |= _walk(child, tables, below, data, state)
        else:
            half = child.content[: len(child.content) // 2]
            unsynced = {"empty": b"", "half": half, "full": child.content, "junk": b"\xa5" * len(child.content)}
            state[below] = child.content if child.synced else unsynced[data]
            torn |= not child.synced and bool(child.content)
    return torn


def states(events: Sequence[Event], *, first: int = 0, every: int = 1) -> Iterator[tuple[int, dict[str, bytes | None]]]:
    """Generate the distinct states that a crash after an event may leave, with the number of events until then.

    Args:
        events: the recorded events.
        first: number of events that are applied without a crash.
        every: try a crash after every Nth event only.
    """
    world, seen = World(), set()
    for number, event in enumerate(events, 1):
        world.apply(event)
        if number <= first or number % every:
            continue
        for state in world.crash_states(random.Random(number)):
            key = (
                hash(tuple(sorted((path, content) for path, content in state.items() if content is not None))),
                tuple(sorted(state)),
            )
            if (key, _commits(events, number)) not in seen:
                seen.add((key, _commits(events, number)))
                yield number, state


def _commits(events: Sequence[Event], number: int) -> int:
    return sum(event.kind == "fsyncdir" and event.path.endswith("commits") for event in events[:number])


def lay_out(state: dict[str, bytes | None], base: Path) -> None:
    """Write a state to disk in the folder `base`, which is empty."""
    for path, content in sorted(state.items()):
        if content is None:
            (base / path).mkdir(mode=0o700)
        else:
            (base / path).write_bytes(content)
