"""What tests of data share."""

import pytest

from erde_hub.data import load_image_data


@pytest.fixture
def load(tmp_path):
    """Loads images with a cache of the test's own."""

    def call(dataset, **kwargs):
        return load_image_data(dataset, **{"cache_dir": tmp_path / "cache", "progress": False, **kwargs})

    return call
