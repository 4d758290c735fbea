import pytest
import red_zones


@pytest.fixture(autouse=True)
def _fresh_zones():
    red_zones._zones.clear()
