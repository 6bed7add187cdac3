"""What the tests in transformers' source distribution import, and that distribution lacks. `test_peer_suite.py` writes
these texts beside them."""

FILES = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "tests/pipelines/__init__.py": "",
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url): return url\n",
}
