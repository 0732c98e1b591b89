"""The files around the package agree with it."""

import re
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

from cryptoresearch import __version__
from cryptoresearch.settings import Settings

ROOT = Path(__file__).resolve().parents[1]


def env_example() -> dict[str, str | None]:
    "Names and values of .env.example; None for a setting that has no default and is commented out."
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    return {name: None if off else value for off, name, value in re.findall(r"^(#?)([A-Z_]+)=(.*)$", text, re.MULTILINE)}


def test_env_example_names_every_setting() -> None:
    assert set(env_example()) == {name.upper() for name in Settings.model_fields}


def test_env_example_shows_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in env_example():
        monkeypatch.delenv(name, raising=False)
    assert Settings(_env_file=ROOT / ".env.example") == Settings(_env_file=None)
    assert {k.lower() for k, v in env_example().items() if v is None} == {k for k, f in Settings.model_fields.items() if f.default is None}


def test_every_setting_is_explained() -> None:
    "Each name, or the group it belongs to, has a comment above it."
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    for block in re.split(r"\n(?=# )", text):
        assert len(re.findall(r"^#?[A-Z_]+=", block, re.MULTILINE)) <= 2, f"explain each of these: {block}"


def test_the_version_is_one() -> None:
    parser = ConfigParser(delimiters=["="], comment_prefixes=(";",))
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    assert parser["DEFAULT"]["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_container_images_are_pinned_and_the_same_everywhere() -> None:
    import s3_server

    compose = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    assert f"image: {s3_server.IMAGE}" in compose
    assert f"image: versity/versitygw:{s3_server.VERSITYGW.rpartition('@')[2]}" in compose
    for image in re.findall(r"^\s+image:\s*(\S+)", compose, re.MULTILINE):
        assert ":latest" not in image and ":" in image.rsplit("/", 1)[-1]
    assert not re.search(r"^\s+- \"?(?!127\.0\.0\.1:)[\d.]+:\d+:\d+", compose, re.MULTILINE)


def test_each_container_receives_only_the_secrets_that_it_needs() -> None:
    import yaml
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    given = {name: set(service["environment"]) for name, service in services.items()}
    assert not [name for name, service in services.items() if "env_file" in service], "an env_file gives every secret to a service"
    assert [name for name, names in given.items() if "FINNHUB_TOKEN" in names] == ["collector", "live"]
    assert [name for name, names in given.items() if "ALERT_URL" in names] == ["live"]
    assert {name for name, names in given.items() if any("ROOT" in n for n in names)} == {"s3", "minio"}
    ours = {name: names for name, names in given.items() if services[name].get("build")}
    assert set(ours) == {"lab", "dashboards", "api", "collector", "live"}
    of_the_host = {"MINIO_CA_FILE", "API_HOST", "API_PORT", "DASHBOARD_PORT", "CRYPTORESEARCH_SHARED_DATA", "DUCKDB_TEMP_DIR"}
    of_the_api = {"API_KEYS", "API_ORIGINS", "API_REQUESTS_PER_MINUTE"}
    assert {name for name, names in given.items() if names & of_the_api} == {"api"} and of_the_api <= given["api"]
    wanted = {name.upper() for name in Settings.model_fields} - of_the_host - of_the_api - {"FINNHUB_TOKEN"}
    assert all(wanted <= names for names in ours.values()), {name: wanted - names for name, names in ours.items()}


def resolved(text: str, env: dict[str, str]) -> str:
    "Resolve `${NAME:-default}` as Compose does, innermost first."
    while (found := re.search(r"\$\{(\w+):-([^${}]*)\}", text)) is not None:
        text = text.replace(found[0], env.get(found[1]) or found[2])
    return text


def test_containers_receive_the_settings_that_are_written_s3() -> None:
    import yaml
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    for field in ("minio_region", "minio_bucket_raw", "minio_bucket_lake"):
        ours, theirs = field.upper(), field.upper().replace("MINIO_", "S3_")
        texts = [services[name]["environment"][ours] for name in ("lab", "dashboards", "api", "collector")]
        texts += [services["buckets"]["environment"][ours.rsplit("_", 1)[1]]] if "bucket" in field else []
        for text in texts:
            assert resolved(text, {}) == Settings.model_fields[field].default
            assert resolved(text, {theirs: "x1"}) == "x1" and resolved(text, {ours: "x2", theirs: "x1"}) == "x2"


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_says_what_it_can_do() -> None:
    text = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"make {target}" in text for target in ("demo", "test", "lab", "dashboards", "api", "bench", "clean"))


def test_find_python_says_in_one_line_what_to_do(tmp_path: Path) -> None:
    for tool in ("sh", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path), "PYTHON": str(tmp_path / "python3.9")}
    done = subprocess.run(["sh", ROOT / "scripts/find_python"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stdout
    assert len(done.stderr.strip().splitlines()) == 1 and "3.12" in done.stderr


def test_find_python_passes_over_a_shim_that_does_not_start(tmp_path: Path) -> None:
    import sys

    broken = tmp_path / "python3.12"
    broken.write_text("#!/bin/sh\necho 'python3.12: command not found' >&2\nexit 127\n")
    broken.chmod(0o755)
    version = tmp_path / "versions" / f"{sys.version_info[0]}.{sys.version_info[1]}.1" / "bin"
    version.mkdir(parents=True)
    (version / "python3").symlink_to(sys.executable)
    (tmp_path / "sh").symlink_to(shutil.which("sh") or "sh")
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path)}
    done = subprocess.run(["sh", ROOT / "scripts/find_python"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).exists()
