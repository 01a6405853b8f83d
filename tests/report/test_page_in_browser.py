"""Pages in a browser: they need no network, and what the script adds works by clicks and by keys.

The tests need Chromium with its driver, and selenium. They are skipped where these are missing.
"""

import base64
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("selenium")

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver")
FLAGS = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
FLAGS += ["disable-component-update", "disable-sync", "disable-dev-shm-usage"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator["webdriver.Chrome"]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, invented_report) -> Iterator["webdriver.Chrome"]:
    """The page of the invented report, newly opened at 1,000 x 900 pixels. It must not write to the console."""
    _, root = invented_report
    show(browser, root / "reports/digits/index.html", 1000)
    yield browser
    assert browser.get_log("browser") == []


def show(browser, path: Path, width: int, scheme: str = "light") -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(path.as_uri())


def find(page, selector: str) -> WebElement:
    return page.find_element(By.CSS_SELECTOR, selector)


def find_all(page, selector: str) -> list[WebElement]:
    return page.find_elements(By.CSS_SELECTOR, selector)


def press(page, *keys: str) -> None:
    for key in keys:
        ActionChains(page).send_keys(key).perform()


def shown(elements: list[WebElement]) -> list[WebElement]:
    """Those of some elements that are displayed, asked for at once."""
    script = "return arguments[0].filter(each => each.getClientRects().length > 0)"
    return elements[0].parent.execute_script(script, elements)


def test_a_click_on_the_legend_hides_a_method_in_all_panels(page):
    lines = find_all(page, '#figure-certified_accuracy svg g[data-series="rrcm"]')
    button = find(page, '#figure-certified_accuracy .legend [data-series="rrcm"] button')
    assert len(lines) >= 2 and len(shown(lines)) == len(lines) and button.text == "rRCM"
    button.click()
    assert button.get_attribute("aria-pressed") == "false" and not shown(lines)
    others = find_all(page, '#figure-certified_accuracy svg g[data-series="consistency"]')
    assert len(shown(others)) == len(others) > 0
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-pressed") == "true" and len(shown(lines)) == len(lines)


def test_the_pointer_and_the_arrow_keys_read_values_with_intervals(page):
    figure = find(page, "#figure-certified_accuracy")
    panel, readout = find(figure, ".panel"), find(figure, ".readout")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", panel)
    assert not readout.is_displayed()
    ActionChains(page).move_to_element(panel).perform()
    assert readout.text.startswith("L2 radius r (pixels in [0, 1]): 0.") and readout.text.count("rRCM") == 1
    ActionChains(page).move_to_element(find(page, "h1")).perform()
    assert not readout.is_displayed()
    page.execute_script("arguments[0].focus()", panel)
    press(page, Keys.END, Keys.HOME)
    row = page.execute_script(
        "return [...arguments[0].querySelector('table').rows[1].cells].map(c => c.innerText)", figure
    )
    heads = page.execute_script(
        "return [...arguments[0].querySelector('table').rows[0].cells].map(c => c.innerText)", figure
    )
    assert readout.text.splitlines()[0].endswith(": 0") and " to " in readout.text
    text = panel.get_attribute("aria-valuetext")
    assert all(f"{name.strip()} {value}" in text for name, value in zip(heads[1:], row[1:], strict=True) if value)
    press(page, Keys.ARROW_RIGHT)
    assert panel.get_attribute("aria-valuenow") == "1" and panel.get_attribute("aria-valuetext") != text
    find(figure, '.legend [data-series="rrcm"] button').click()
    page.execute_script("arguments[0].focus()", panel)
    press(page, Keys.HOME)
    assert "rRCM " not in panel.get_attribute("aria-valuetext")
    press(page, Keys.ESCAPE)
    assert not readout.is_displayed()


def test_points_are_read_one_at_a_time(page):
    figure = find(page, "#figure-latency")
    panel = find(figure, ".panel")
    page.execute_script("arguments[0].focus()", panel)
    press(page, Keys.HOME)
    assert panel.get_attribute("aria-valuetext").startswith("rRCM: 1.0×")
    assert " to " in find(figure, ".readout").text and "seconds per image" in find(figure, ".readout").text


def test_a_click_sorts_a_table_and_a_third_restores_it(page):
    table = find(page, "#certified-accuracy ~ [data-table] table")

    def column() -> list[str]:
        return [row.text for row in find_all(table, "tbody tr td:nth-child(3)")]

    head, before = find(table, "thead th:nth-child(3)"), column()
    assert head.get_attribute("aria-sort") == "none"
    find(head, "button").click()
    down = column()
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(each.split()[0]) for each in down] == sorted(
        (float(each.split()[0]) for each in before), reverse=True
    )
    find(head, "button").send_keys(Keys.SPACE)
    assert head.get_attribute("aria-sort") == "ascending" and column() == down[::-1]
    find(head, "button").send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "none" and column() == before


def test_tables_are_copied_as_csv_and_latex(page, invented_report):
    page.execute_script("navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve() }")
    buttons = find_all(page, ".tools button")
    csv, latex = (button for button in buttons[:2])
    csv.click()
    text = page.execute_script("return window.copied")
    assert text.startswith("method,r = 0,r = 0.25,") and '"Consistency, matched compute",' in text
    assert find(page, ".tools [role=status]").text == "copied"
    latex.send_keys(Keys.ENTER)
    text = page.execute_script("return window.copied")
    assert text.startswith("\\begin{tabular}{lr") and "\n\\midrule\n rRCM & " in text and "ACR ($\\sigma$)" in text


def test_the_gallery_is_filtered_by_class_answer_and_radius(page):
    gallery = find(page, "[data-gallery]")
    cards, status = find_all(gallery, ".cards > li"), find(gallery, "[role=status]")
    assert status.text == f"{len(cards)} of {len(cards)} images shown"
    Select(find(gallery, "[name=class]")).select_by_visible_text("3")
    threes = shown(cards)
    assert 0 < len(threes) < len(cards) and {card.get_attribute("data-class") for card in threes} == {"3"}
    assert status.text == f"{len(threes)} of {len(cards)} images shown"
    Select(find(gallery, "[name=verdict]")).select_by_visible_text("correct")
    assert "✓ 3" in shown(cards)[0].text and "✗" not in gallery.text.partition("images shown")[2]
    find(gallery, "[name=radius]").send_keys(Keys.END)
    assert len(shown(cards)) < len(threes)
    find(gallery, "[type=reset]").click()
    assert len(shown(cards)) == len(cards)
    first = find(cards[0], ".chosen")
    Select(find(gallery, "[name=deployed]")).select_by_index(1)
    assert not first.is_displayed() and len(shown(find_all(cards[0], ".answer"))) == 1


def test_everything_can_be_reached_and_opened_by_keys(page):
    press(page, Keys.TAB)
    assert page.switch_to.active_element.text == "Skip to the contents"
    details = find(page, "details.data")
    assert details.get_attribute("open") is None
    page.execute_script("arguments[0].focus()", find(details, "summary"))
    press(page, Keys.ENTER)
    assert details.get_attribute("open") is not None and find(details, "table").is_displayed()


@pytest.mark.parametrize("width", [320, 768, 1600])
def test_the_page_is_never_wider_than_the_window(page, invented_report, width: int):
    _, root = invented_report
    show(page, root / "reports/digits/index.html", width)
    page.execute_script("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.thorough
@pytest.mark.parametrize(("scheme", "rules"), [("light", {}), ("dark", {"runOnly": ["color-contrast"]})])
def test_axe_finds_no_violation(page, invented_report, scheme: str, rules: dict):
    """In the dark page only the colours are others."""
    spec = importlib.util.find_spec("axe_core_python")
    if spec is None:
        pytest.skip("needs axe-core-python")
    _, root = invented_report
    show(page, root / "reports/digits/index.html", 1000, scheme)
    page.execute_script("document.querySelectorAll('.scroll').forEach(each => { each.style.background = 'none' })")
    page.execute_script(Path(spec.origin).with_name("axe.min.js").read_text(encoding="utf-8"))
    run = "const done = arguments[1]; axe.run(document, arguments[0]).then(result => done(result.violations))"
    found = page.execute_async_script(run, rules | {"resultTypes": ["violations"]})
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []


def test_the_page_is_printed(page):
    printed = base64.b64decode(page.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert printed.startswith(b"%PDF") and printed.count(b"/Type /Page\n") >= 3


def test_it_is_readable_without_script(browser, invented_report):
    _, root = invented_report
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, root / "reports/digits/index.html", 1000)
        assert not shown(find_all(browser, ".filters")) and not find_all(browser, "button:not(form button)")
        assert all(card.is_displayed() for card in find_all(browser, ".answer")[:4])
        assert find(browser, "#figure-envelope svg").is_displayed() and find(browser, ".legend li").text == "rRCM"
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
