"""The longest files begin first, so that two workers end at about the same time (`--no-loadscope-reorder` keeps this order)."""
LONG = ["test_runs", "test_extraction", "test_sweeps", "test_dub_runs", "test_browsers", "test_studies", "test_kills", "test_modes", "test_similarity", "test_traps", "test_dubs", "test_configs", "test_processes", "test_imports"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
