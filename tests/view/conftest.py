"""One browser for all tests of pages in a process."""

import pytest

from tests.view.browser import chromium


@pytest.fixture(scope="package")  # it leaves an event loop running in this thread
def browser():
    with chromium() as found:
        yield found
