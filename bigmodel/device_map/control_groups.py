"""The limits of this process's control groups, of both versions."""

from __future__ import annotations

from pathlib import Path

__all__ = ["ControlGroups"]


class ControlGroups:
    """The limits of this process's control groups and of all groups above them, of both versions."""

    def __init__(self, root: Path) -> None:
        self._mounts = root / "sys/fs/cgroup"
        self._paths: dict[str, str] = {}
        try:
            lines = (root / "proc/self/cgroup").read_text().splitlines()
        except OSError:
            lines = []
        for line in lines:
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            for controller in controllers.split(","):
                self._paths[controller] = path

    def free_memory_bytes(self) -> list[int]:
        """Per limited group: its limit less what is used, page cache that can be dropped not counted as used."""
        free = []
        for folder in self._folders("memory"):
            limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
            if limit is None or limit >= 1 << 60:
                continue
            used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
            free.append(max(0, limit - max(0, used - _reclaimable(folder / "memory.stat"))))
        return free

    def processors(self) -> list[float]:
        """Per limited group: processors that its quota amounts to."""
        found = []
        for folder in self._folders("cpu"):
            try:
                quota, period = (folder / "cpu.max").read_text().split()
            except (OSError, ValueError):
                quota = str(_number(folder / "cpu.cfs_quota_us") or "max")
                period = str(_number(folder / "cpu.cfs_period_us") or 100_000)
            if quota != "max" and int(quota) > 0:
                found.append(int(quota) / int(period))
        return found

    def _folders(self, controller: str) -> list[Path]:
        """The group's folder and those above it, up to the mount; the mount alone where the path is another namespace's."""
        mount = self._mounts / controller if (self._mounts / controller).is_dir() else self._mounts
        path = self._paths.get(controller, self._paths.get("", "/")).strip("/")
        folder = mount / path
        if not folder.is_dir():
            return [mount]
        folders = [folder]
        while folder != mount:
            folder = folder.parent
            folders.append(folder)
        return folders


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.lstrip("-").isdigit() else None


def _reclaimable(stat: Path) -> int:
    """Bytes of file pages in a group's memory.stat; a v1 group's own totals include the groups below it."""
    try:
        pairs = (line.split() for line in stat.read_text().splitlines())
        fields = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    except OSError:
        return 0
    prefix = "total_" if "total_inactive_file" in fields else ""
    return sum(fields.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
