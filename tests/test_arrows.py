"""The rooms and their arrows: no import runs back up, and the core stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("dare_agg", "server", "client", "simulations")
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "ray",
    "matplotlib",
    "jinja2",
    "datasets",
    "flwr_datasets",
    "pandas",
    "tensorboard",
    "prometheus_client",
    "grpc",
    "numba",
    "llvmlite",
}
# Who may import whom inside the library; errors.py may be imported by all.
ARROWS = {
    "errors": "",
    "files": "",
    "vectors": "",
    "codec": "files vectors",
    "checkpoint": "files vectors",
    "deploy": "files",
    "merge": "codec vectors",
    "downlink": "codec files vectors",
    "secure": "codec checkpoint files merge privacy vectors",
    "privacy": "codec files vectors",
    "robust": "codec vectors",
    "rounds": "codec downlink files merge privacy robust vectors",
    "offline": "checkpoint codec files merge vectors",
    "flower": "checkpoint codec deploy downlink files merge privacy robust rounds secure vectors",
    "torch": "codec files flower rounds vectors",
    "nvflare": "codec downlink files flower robust rounds vectors",
    "runs": "files offline vectors",
    # All but torch and nvflare, which apps and jobs import.
    "cli": "checkpoint codec deploy downlink files flower merge offline privacy robust rounds runs "
    "secure vectors",
}
# The same for simulations/: run.py stands on top, and nothing imports it.
SIMULATIONS = {
    "runs": "",
    "bench": "runs",
    "flower_examples": "runs",
    "pages": "runs",
    "run": "runs",
}
# The most entries that may stand side by side at the library's root.
MOST_ENTRIES = 18
# Rooms of arithmetic: numpy and cryptography (and RE2 for patterns of names), and nothing else
# from outside.
ARITHMETIC = ("vectors", "codec", "merge", "robust")
# Imported by nothing at module level: `dare_agg.codec.kernels` loads it when it pays.
COMPILED = ROOT / "dare_agg" / "codec" / "numba_loops.py"


def imports(path: Path, *, module_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.level == 0:
                found.add(child.module or "")
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if module_level_only and (is_function or _is_type_checking(child)):
                continue
            visit(child)

    visit(tree)
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_files(room: str) -> None:
    assert files(room)


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("dare_agg", {"server", "client", "simulations", "tests"}),
        ("server", {"client", "simulations", "tests"}),
        ("client", {"server", "simulations", "tests"}),
        ("simulations", {"tests"}),
    ],
)
def test_no_import_runs_back_up(room: str, forbidden: set[str]) -> None:
    bad = {
        str(path.relative_to(ROOT)): sorted(tops(imports(path)) & forbidden)
        for path in files(room)
        if tops(imports(path)) & forbidden
    }
    assert not bad


def rooms(house: str = "dare_agg") -> dict[str, list[Path]]:
    """The rooms of a house and their files; a file at the root is a room of its own."""
    found: dict[str, list[Path]] = {}
    for path in files(house):
        first = path.relative_to(ROOT / house).parts[0].removesuffix(".py")
        if first != "__init__":
            found.setdefault(first, []).append(path)
    return found


def imported_rooms(path: Path) -> set[str]:
    """The rooms of its own house that a file imports from, inside functions too."""
    house = path.relative_to(ROOT).parts[0]
    names = {name for name in imports(path) if name.startswith(f"{house}.")}
    return {name.split(".")[1] for name in names} & set(rooms(house))


def test_the_tables_name_every_room() -> None:
    assert set(rooms()) == set(ARROWS)
    assert len(ARROWS) <= MOST_ENTRIES
    assert set(rooms("simulations")) == set(SIMULATIONS)


@pytest.mark.parametrize(
    ("house", "room", "below"),
    [
        *(("dare_agg", room, f"errors {below}") for room, below in ARROWS.items()),
        *(("simulations", room, below) for room, below in SIMULATIONS.items()),
    ],
)
def test_a_room_imports_from_its_own_rooms_only(house: str, room: str, below: str) -> None:
    allowed = {room, *below.split()}
    bad = {
        str(path.relative_to(ROOT)): sorted(imported_rooms(path) - allowed)
        for path in rooms(house)[room]
        if imported_rooms(path) - allowed
    }
    assert not bad


def test_the_table_has_no_circle_and_eight_floors() -> None:
    floors: dict[str, int] = {"errors": 1}
    below = {room: set(to.split()) for room, to in ARROWS.items()}
    while len(floors) < len(below):
        ready = [r for r in below if r not in floors and below[r] | {"errors"} <= set(floors)]
        assert ready, f"a circle among {sorted(set(below) - set(floors))}"
        floors.update({r: 1 + max(floors[b] for b in below[r] | {"errors"}) for r in ready})
    # simulations/ stands on top of server/ and client/, which stand beside cli.
    assert max(floors.values()) + 1 <= 8, floors


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_two_files_import_each_other() -> None:
    paths = {module_of(path): path for path in files("dare_agg")}
    left: dict[str, set[str]] = {}
    for name, path in paths.items():
        left[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in paths:
                modules = {f"{node.module}.{alias.name}" for alias in node.names} & set(paths)
                left[name] |= modules or {node.module}
    while free := [name for name, needed in left.items() if not needed & set(left)]:
        for name in free:
            del left[name]
    assert not left


@pytest.mark.parametrize(("room", "engine"), [("flower", "flwr"), ("nvflare", "nvflare")])
def test_only_an_engines_own_room_of_the_library_imports_it(room: str, engine: str) -> None:
    bad = [
        str(path.relative_to(ROOT))
        for other, paths in rooms().items()
        for path in paths
        if other != room and engine in tops(imports(path, module_level_only=True))
    ]
    assert not bad


@pytest.mark.parametrize("room", ARITHMETIC)
def test_the_rooms_of_arithmetic_need_numpy_and_cryptography_alone(room: str) -> None:
    known = {"numpy", "cryptography", "re2", "dare_agg"} | set(sys.stdlib_module_names)
    bad = {
        str(path.relative_to(ROOT)): sorted(tops(imports(path, module_level_only=True)) - known)
        for path in rooms()[room]
        if path != COMPILED and tops(imports(path, module_level_only=True)) - known
    }
    assert not bad


def test_the_core_imports_nothing_heavy_at_module_level() -> None:
    outside = {ROOT / "dare_agg" / room for room in ("flower", "torch")}
    bad = {
        str(path.relative_to(ROOT)): sorted(tops(imports(path, module_level_only=True)) & HEAVY)
        for path in files("dare_agg")
        if not outside & set(path.parents)
        and path != COMPILED
        and tops(imports(path, module_level_only=True)) & HEAVY
    }
    assert not bad


def test_the_compiled_loops_are_imported_by_nothing() -> None:
    assert not [path for path in files("dare_agg") if "dare_agg.codec.numba_loops" in imports(path)]


def test_nothing_uses_pickle() -> None:
    bad = [
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in files(room)
        if tops(imports(path)) & {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
    ]
    assert not bad


def cpu_seconds(*command: str) -> float:
    """Least CPU time of a few fresh processes (user + system), in seconds."""
    script = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "usage = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(usage.ru_utime + usage.ru_stime)\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", script, *command],
            check=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
        ).stdout
        for _ in range(3)
    ]
    return min(float(run) for run in runs)


def test_help_loads_no_heavy_library() -> None:
    script = (
        "import sys\n"
        "from dare_agg.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        f"print(sorted(set(sys.modules) & {HEAVY | {'flwr', 'numpy'}!r}), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stderr.strip() == "[]"
    assert "merge" in done.stdout


@pytest.mark.slow
def test_start_up_is_cheap() -> None:
    assert cpu_seconds(sys.executable, "-c", "import dare_agg") <= 0.5
    assert cpu_seconds(sys.executable, "-m", "dare_agg.cli.main", "--help") <= 0.5
