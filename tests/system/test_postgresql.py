"""The brain on the distribution's PostgreSQL, whose version and extensions are its own."""

import pytest

from tests.support.demo_run import assert_figures_agree

pytestmark = pytest.mark.timeout(300)


def test_demo_figures_agree_on_postgresql_of_system(postgres, tmp_path):
    """The day of the demo agrees, and the database is empty afterwards."""
    url = postgres.user_database()
    assert_figures_agree("gevent", tmp_path, "--database", url)
    assert postgres.objects(url) == []
