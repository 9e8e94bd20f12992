"""What pip does to an installation of this package beside an index with the existing agent."""

import json
import subprocess
import sys
import venv
import zipfile

import pytest

OURS = "1.13.0+green.2"
CONSTRAINT = f"z4j-bare=={OURS}"


def make_wheel(directory, name, version, *requirements):
    """Write an empty wheel with this name and version."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requirements)
    with zipfile.ZipFile(directory / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return directory / f"{stem}-py3-none-any.whl"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A team's files: its wheels, and an environment with this package and an adapter."""
    home = tmp_path_factory.mktemp("shop")
    (home / "wheels").mkdir()
    make_wheel(home / "wheels", "z4j-bare", OURS)
    venv.create(home / "venv", with_pip=False)
    adapter = make_wheel(home, "z4j-celery", "1.13.0", "z4j-bare>=1.13.0,<2")
    pip(home, "install", adapter, "--find-links", home / "wheels")
    (home / "constraints.txt").write_text(f"{CONSTRAINT}\n")
    return home


@pytest.fixture
def index(tmp_path):
    """Return a function that makes a public index with the given versions of the existing agent."""

    def make(*versions):
        for version in versions:
            make_wheel(tmp_path, "z4j-bare", version)
        make_wheel(tmp_path, "z4j-celery", "1.14.0", "z4j-bare>=1.13.0,<2")
        return tmp_path

    return make


def pip(home, command, *arguments):
    """Run pip for the environment of ``home`` without a network; return the completed process."""
    return subprocess.run(
        (
            *(sys.executable, "-m", "pip", "--isolated", "--python", str(home / "venv")),
            *(command, "--no-index", "--quiet", *map(str, arguments)),
        ),
        capture_output=True,
        text=True,
        timeout=120,
        check=command == "install" and "--dry-run" not in arguments,
    )


def would_install(home, index, *arguments):
    """Return what pip would install with the public index, by name; None if pip fails."""
    done = pip(home, "install", "--dry-run", "--report", "-", "--find-links", index, *arguments)
    if done.returncode:
        return None
    return {
        item["metadata"]["name"]: item["metadata"]["version"]
        for item in json.loads(done.stdout)["install"]
    }


@pytest.mark.parametrize(
    ("published", "installed"),
    [("1.13.0", {}), ("1.13.1", {"z4j-bare": "1.13.1"}), ("1.14.0", {"z4j-bare": "1.14.0"})],
)
def test_upgrade_without_constraint_installs_a_later_release(shop, index, published, installed):
    """``pip install --upgrade z4j-bare`` keeps this package if the index has only 1.13.0."""
    public = index(published)
    assert would_install(shop, public, "--upgrade", "z4j-bare") == installed


def test_upgrade_of_an_adapter_keeps_ours(shop, index):
    """An upgrade of an adapter keeps this package unless the strategy is ``eager``."""
    public = index("1.13.0", "1.14.0")
    adapter = {"z4j-celery": "1.14.0"}
    assert would_install(shop, public, "--upgrade", "z4j-celery") == adapter
    eager = would_install(shop, public, "--upgrade", "--upgrade-strategy", "eager", "z4j-celery")
    assert eager == adapter | {"z4j-bare": "1.14.0"}


def test_constraint_and_wheels_keep_ours(shop, index):
    """With the constraint and the team's wheels, pip installs this package in both cases."""
    public = index("1.13.0", "1.13.1", "1.14.0")
    ours = ("--constraint", shop / "constraints.txt", "--find-links", shop / "wheels")
    assert would_install(shop, public, "--upgrade", "z4j-bare", *ours) == {}
    new = would_install(shop, public, "--ignore-installed", "z4j-celery", *ours)
    assert new == {"z4j-bare": OURS, "z4j-celery": "1.14.0"}


def test_wheels_without_constraint_do_not_keep_ours(shop, index):
    """A team's index alone is not enough, because pip takes the highest version of all indexes."""
    public = index("1.13.0", "1.14.0")
    new = would_install(
        shop, public, "--ignore-installed", "z4j-celery", "--find-links", shop / "wheels"
    )
    assert new == {"z4j-bare": "1.14.0", "z4j-celery": "1.14.0"}


def test_constraint_without_wheels_fails(shop, index):
    """If pip does not find this package, the constraint makes the installation fail."""
    public = index("1.13.0", "1.14.0")
    constraint = ("--constraint", shop / "constraints.txt")
    assert would_install(shop, public, "--ignore-installed", "z4j-celery", *constraint) is None


def test_direct_reference_is_kept_until_an_upgrade(shop, index):
    """A direct reference installs this package; an upgrade without the reference replaces it."""
    public = index("1.13.0", "1.14.0")
    (wheel,) = (shop / "wheels").iterdir()
    reference = f"z4j-bare @ {wheel.as_uri()}"
    new = would_install(shop, public, "--ignore-installed", "z4j-celery", reference)
    assert new == {"z4j-bare": OURS, "z4j-celery": "1.14.0"}
    assert would_install(shop, public, "--upgrade", "z4j-bare") == {"z4j-bare": "1.14.0"}


def test_return_to_the_existing_agent_needs_three_equals_signs(shop, index):
    """For ``==1.13.0`` pip keeps this package; ``===1.13.0`` installs the existing agent."""
    public = index("1.13.0")
    assert would_install(shop, public, "z4j-bare==1.13.0") == {}
    assert would_install(shop, public, "z4j-bare===1.13.0") == {"z4j-bare": "1.13.0"}
