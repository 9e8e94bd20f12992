"""Build entry point; every fact about the package stands in ``setup.cfg``."""

import gzip
import os
import tarfile
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist


class ReproducibleSdist(sdist):
    """Source distribution whose bytes depend only on contents and ``SOURCE_DATE_EPOCH``.

    setuptools writes the files' times, owners and modes into the archive, which differ between two
    checkouts of one commit. The wheel needs no such class: it is built from the source
    distribution, and setuptools uses the variable for its times.
    """

    def make_archive(  # noqa: D102 - setuptools calls it
        self,
        base_name: str,
        format: str,  # noqa: A002
        root_dir: str | None = None,
        base_dir: str | None = None,
        owner: str | None = None,
        group: str | None = None,
    ) -> str:
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar" or base_dir is None:
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)

        def normalise(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mtime = int(epoch)
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        target = Path(f"{base_name}.tar.gz")
        with (
            target.open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=int(epoch)) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(base_dir, filter=normalise)  # adds the entries of a directory sorted
        return str(target)


if "SOURCE_DATE_EPOCH" in os.environ:
    os.umask(0o022)  # setuptools writes the modes of new files into the wheel
setup(cmdclass={"sdist": ReproducibleSdist})
