"""The tests of the method table and of the settings pass after all three recipes of the READMEs."""

import pytest
from recipe import copy_code, follow, run

RECIPES = {
    "rrcm/data/README.md": "Add a data set",
    "rrcm/models/README.md": "Add a base classifier",
    "rrcm/objectives/README.md": "Add a loss",
}
TABLES = ["tests/test_methods.py", "tests/test_config.py", "tests/test_schedules.py"]
TABLES += ["-k", "not every_profile or mine"]  # all profiles take minutes


@pytest.mark.thorough
def test_the_tables_pass_their_tests_with_all_additions(tmp_path):
    copy_code(tmp_path)
    for readme, heading in RECIPES.items():
        assert follow(readme, heading, tmp_path)
    for command in (
        ["stages/compose.py"],
        ["stages/settings.py"],
        ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TABLES],
    ):
        answer = run(tmp_path, *command)
        assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr
