"""The page in a real browser: a message typed, an answer read, the engine drawn."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from http_world import World

from armillary.web.app import create_app

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[dev]'")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SHOTS = Path(__file__).parents[2] / "runs" / "screenshots"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no Chromium here: apt-get install chromium chromium-driver (make test does it where it may)"
)

HOSTILE = (
    "<img src=x onerror=\"document.title='broken'\"> <script>document.title='broken'</script> "
    "**bold <b>tag</b>** [link](javascript:alert(1)) [good](https://example.org/a)\n\n```html\n<script>1</script>\n```\n- one\n- `two`\n"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("page"), app=create_app)
    yield world
    world.close()


def launch(profile: Path, size: tuple[int, int] = (1360, 900)):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-dev-shm-usage",
        "--disable-component-update",
        "--disable-sync",
    ]:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={profile}")
    options.add_argument(f"--window-size={size[0]},{size[1]}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    driver = launch(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium, world):
    """A fresh page; afterwards its console must be silent."""
    world.typist.delay = 0.01
    chromium.get(world.url)
    chromium.execute_script("localStorage.clear(); sessionStorage.clear()")
    chromium.get(world.url)
    chromium.get_log("browser")
    yield chromium
    complaints = [entry["message"] for entry in chromium.get_log("browser")]
    assert complaints == []
    world.wait_idle()


def until(driver, condition, seconds=20):
    return WebDriverWait(driver, seconds, poll_frequency=0.05).until(lambda _: condition())


def say(driver, text):
    driver.find_element(By.ID, "prompt").send_keys(text + Keys.ENTER)


def answers(driver):
    return driver.find_elements(By.CSS_SELECTOR, ".message.assistant .text")


def done(driver, count=1):
    until(driver, lambda: len(answers(driver)) == count and not driver.find_elements(By.CSS_SELECTOR, ".message.writing"))


def painted(driver, canvas):
    """How many distinct colours a canvas shows."""
    script = """
        const canvas = document.getElementById(arguments[0]);
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        const seen = new Set();
        for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 200) seen.add(`${data[i]},${data[i + 1]},${data[i + 2]}`);
        return seen.size;
    """
    return driver.execute_script(script, canvas)


def test_a_message_is_answered_and_the_engine_is_drawn(browser, world):
    until(browser, lambda: browser.find_element(By.ID, "model").text == "typist")
    columns = int(browser.find_element(By.ID, "picture").get_attribute("data-columns"))
    world.typist.reply = lambda request: "The **sphere** turns, wörld 👋.\n\n" + "It turns slowly. " * 6
    world.typist.delay = 0.03
    say(browser, "Does it turn?")
    until(browser, lambda: answers(browser) and "sphere" in answers(browser)[0].text)
    assert browser.find_elements(By.CSS_SELECTOR, ".message.writing")  # it streams: text is there before the end
    until(browser, lambda: browser.find_element(By.ID, "tile-running").text == "1")
    until(browser, lambda: int(browser.find_element(By.ID, "picture").get_attribute("data-columns")) > columns)
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#requests li"))
    assert painted(browser, "picture") >= 3
    assert painted(browser, "blocks") >= 3
    SHOTS.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(SHOTS / "page.png"))
    done(browser)
    assert answers(browser)[0].text.startswith("The sphere turns, wörld 👋.")
    assert answers(browser)[0].find_element(By.TAG_NAME, "strong").text == "sphere"
    foot = browser.find_element(By.CSS_SELECTOR, ".message.assistant .foot").text
    assert "tokens" in foot
    assert "first after" in foot
    until(browser, lambda: browser.find_element(By.ID, "tile-running").text == "0")


def test_the_whole_conversation_and_the_settings_are_sent(browser, world):
    seen = []
    world.typist.reply = lambda request: seen.append(request) or "noted"
    browser.find_element(By.ID, "open-settings").click()
    for name, value in {
        "system": "Be brief.",
        "temperature": "0.3",
        "top_k": "7",
        "seed": "5",
        "max_completion_tokens": "40",
        "stop": "END\nFIN",
    }.items():
        browser.find_element(By.NAME, name).send_keys(value)
    browser.find_element(By.CSS_SELECTOR, "#settings .primary").click()
    say(browser, "one")
    done(browser)
    say(browser, "two")
    done(browser, 2)
    sampling = seen[-1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.max_tokens, sampling.stop) == (0.3, 7, 5, 40, ("END", "FIN"))
    prompt = world.tokenizer.decode(seen[-1].prompt, skip_special=False)
    assert [part.partition("<|im_end|>")[0] for part in prompt.split("<|im_start|>")[1:]] == [
        "system\nBe brief.",
        "user\none",
        "assistant\nnoted",
        "user\ntwo",
        "assistant\n",
    ]


def test_stop_cancels_in_the_engine_and_keeps_the_text(browser, world):
    world.typist.reply = lambda request: "on and on " * 1000
    world.typist.delay = 0.02
    cancelled = world.engine.stats.finished["cancelled"]
    say(browser, "go")
    until(browser, lambda: answers(browser) and "on and" in answers(browser)[0].text)
    browser.find_element(By.ID, "prompt").send_keys(Keys.ESCAPE)
    done(browser)
    world.wait_idle()
    assert world.engine.stats.finished["cancelled"] == cancelled + 1
    assert answers(browser)[0].text.startswith("on and")
    assert "stopped" in browser.find_element(By.CSS_SELECTOR, ".foot .facts").text
    assert browser.find_element(By.ID, "send").is_displayed()


def test_a_new_chat_knows_nothing_of_the_answer_that_it_cut_short(browser, world):
    seen = []
    world.typist.reply = lambda request: seen.append(request) or "on and on " * 1000
    world.typist.delay = 0.02
    say(browser, "go")
    until(browser, lambda: answers(browser) and "on and" in answers(browser)[0].text)
    browser.find_element(By.ID, "new-chat").click()
    world.wait_idle()
    world.typist.reply = lambda request: seen.append(request) or "noted"
    say(browser, "hello")
    done(browser)
    prompt = world.tokenizer.decode(seen[-1].prompt, skip_special=False)
    assert [part.partition("<|im_end|>")[0] for part in prompt.split("<|im_start|>")[1:]] == ["user\nhello", "assistant\n"]


def test_what_a_model_says_is_never_html(browser, world):
    world.typist.reply = lambda request: HOSTILE
    say(browser, "<b>attack</b>")
    done(browser)
    page = browser.find_element(By.ID, "messages")
    assert page.find_elements(By.CSS_SELECTOR, "img, script, b, iframe, [onerror]") == []
    assert [link.get_attribute("href") for link in page.find_elements(By.TAG_NAME, "a")] == ["https://example.org/a"]
    assert "<img src=x" in page.text
    assert "broken" not in browser.title
    assert page.find_element(By.CSS_SELECTOR, "pre code").text == "<script>1</script>"
    assert [item.text for item in page.find_elements(By.CSS_SELECTOR, "ul li")] == ["one", "two"]
    assert page.find_element(By.CSS_SELECTOR, ".message.user").text == "<b>attack</b>"


def test_why_tells_what_the_scheduler_did(browser, world):
    world.typist.reply = lambda request: "because"
    say(browser, "why?")
    done(browser)
    next(button for button in browser.find_elements(By.CSS_SELECTOR, ".foot button") if button.text == "Why?").click()
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#story-events li"))
    told = browser.find_element(By.ID, "story-events").text
    assert "arrived with a prompt" in told
    assert "ended: stop" in told


def test_an_answer_can_be_asked_for_again(browser, world):
    replies = iter(["first", "second"])
    chosen = {}
    world.typist.reply = lambda request: (
        chosen.setdefault(request.id, None) or chosen.update({request.id: next(replies)}) or chosen[request.id]
    )
    say(browser, "again")
    done(browser)
    assert answers(browser)[0].text == "first"
    browser.find_element(By.CSS_SELECTOR, "[data-again]").click()
    until(browser, lambda: answers(browser) and answers(browser)[0].text == "second")
    done(browser)


def test_the_servers_own_words_reach_the_reader(browser, world):
    say(browser, "x" * 600)
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".failure"))
    words = browser.find_element(By.CSS_SELECTOR, ".failure").text
    assert "tokens" in words
    assert "512" in words
    logged = browser.get_log("browser")  # the browser itself notes the 400
    assert all("400" in entry["message"] for entry in logged)


def test_a_stream_is_cut_into_the_same_events_wherever_its_bytes_are_cut(browser):
    script = """
        const [text, cuts, done] = arguments;
        import("/static/api.js").then(async ({ events }) => {
            const bytes = new TextEncoder().encode(text);
            const edges = [0, ...cuts.map((cut) => cut % (bytes.length + 1)).sort((a, b) => a - b), bytes.length];
            const body = new ReadableStream({ start(controller) {
                edges.slice(1).forEach((edge, i) => controller.enqueue(bytes.slice(edges[i], edge)));
                controller.close();
            } });
            const found = [];
            for await (const event of events(body)) found.push(event);
            done(found);
        });
    """
    wanted = ['{"a": "né 👋"}', "two\nlines", "[DONE]"]
    text = 'data: {"a": "né 👋"}\n\n: a comment\n\ndata: two\ndata: lines\n\ndata: [DONE]\n\n'
    for cuts in ([], *([cut] for cut in range(1, 70)), list(range(70))):
        assert browser.execute_async_script(script, text, cuts) == wanted, cuts


def test_each_running_request_has_a_row_of_its_own_and_rows_are_reused(browser):
    script = """
        const done = arguments[0];
        import("/static/history.js").then(({ History }) => {
            const history = new History();
            let seed = 7, next = 0, index = 0, most = 0, clash = 0, running = [];
            const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
            for (let poll = 0; poll < 300; poll += 1) {
                const iterations = [];
                for (let k = random(40); k >= 0; k -= 1) {
                    running = running.filter(() => random(10));
                    while (running.length < 12 && random(3)) running.push(`r${next++}`);
                    most = Math.max(most, running.length);
                    iterations.push({ index: index++, entries: running.map((id) => [id, 1]), preempted: [], blocks_used: 1, start: 0, end: 1 });
                }
                history.add({ iteration: index, now: index, iterations, requests: running.map((id) => ({ id })), stats: { generated_tokens: index } });
                for (const { rows } of history.iterations) if (new Set(rows.map((cell) => cell.row)).size !== rows.length) clash += 1;
            }
            done([clash, history.rows <= most, history.iterations.length, history.numbers.size < 300, history.last === index - 1]);
        });
    """
    assert browser.execute_async_script(script) == [0, True, 120, True, True]


def test_each_part_that_tells_of_itself_has_a_card(browser, world):
    """Ratios as percent with a bar, things of a kind as rows; names and values only ever become text."""
    state = {"proposer": "<b>n-gram</b>", "acceptance": 0.5, "lengths": [3, 4], "nothing": None, "memory_bytes": 2_500_000}
    world.engine.features["speculation"] = lambda: state
    world.engine.features["fleet"] = lambda: {"hedges": 3, "replicas": [{"index": 1, "health": "slow", "running": 2, "features": {}}]}
    try:
        until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, ".feature")) == 3)
        cards = {card.text.splitlines()[0]: card for card in browser.find_elements(By.CSS_SELECTOR, ".feature")}
        assert set(cards) == {"Prefix cache", "Speculation", "Fleet"}
        assert "50 %" in cards["Speculation"].text
        assert "proposer <b>n-gram</b> · lengths 3 4 · 2.5 MB memory" in cards["Speculation"].text
        assert float(cards["Speculation"].find_element(By.TAG_NAME, "progress").get_attribute("value")) == 0.5
        assert "1 · slow" in cards["Fleet"].text
        assert "2 running" in cards["Fleet"].text
        state["acceptance"] = 0.75
        until(browser, lambda: "75 %" in browser.find_element(By.ID, "features").text)
        say(browser, "and what the prefix cache has found")
        done(browser)
        until(browser, lambda: "tokens sought" in browser.find_element(By.ID, "features").text)
    finally:
        world.engine.features.clear()
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, ".feature")) == 1)


def test_virtual_time_is_chosen_run_drawn_and_watched(browser, world):
    def one(name):
        return browser.find_element(By.ID, name)

    def fill(**values):
        for name, value in values.items():
            one(f"sim-{name}").clear()
            one(f"sim-{name}").send_keys(value)

    def columns():
        return int(one("picture").get_attribute("data-columns") or 0)

    one("tab-simulate").click()
    assert not one("chat").is_displayed()
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#names-models option[value='deepseek-v3']"))
    fill(cluster="mine.toml", lengths="400+60", rate="8", requests="40")
    one("simulate-run").click()
    until(browser, lambda: "files are for the command line" in one("simulation-error").text)
    assert one("sim-cluster").get_attribute("aria-invalid") == "true"
    assert all("400" in entry["message"] for entry in browser.get_log("browser"))
    fill(cluster="a100")
    one("simulate-run").click()
    until(browser, lambda: one("simulation-results").is_displayed())
    assert not one("simulation-error").is_displayed()
    assert one("run-command").text.startswith("armillary simulate serve llama-2-7b --cluster a100 --lengths 400+60 --requests 40 --rate 8")
    browser.execute_script(
        "const time = arguments[0]; time.value = time.max / 2; time.dispatchEvent(new Event('input'));", one("player-time")
    )
    until(browser, lambda: columns() > 50)
    assert int(one("tile-running").text) > 0
    assert painted(browser, "picture") >= 4
    browser.find_element(By.CSS_SELECTOR, "#requests button").click()
    until(browser, lambda: "arrived with a prompt of 400 tokens" in one("story-events").text)
    browser.find_element(By.CSS_SELECTOR, "#story .primary").click()
    before = one("player-clock").text
    one("run-watch").click()
    until(browser, lambda: one("player-clock").text != before and one("player-play").get_attribute("aria-label") == "Pause")
    one("player-play").click()
    fill(lengths="100+2")
    browser.find_element(By.CSS_SELECTOR, "#simulation summary").click()
    fill(tolerance="0.5")
    one("simulate-capacity").click()
    until(browser, lambda: "requests a second" in one("capacity-what").text)
    points = int(one("capacity-charts").get_attribute("data-points"))
    assert len(browser.find_elements(By.CSS_SELECTOR, "#capacity-charts figure")) == 4
    assert len(browser.find_elements(By.CSS_SELECTOR, "#capacity-charts figure:first-child .mark")) == points > 3
    SHOTS.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(SHOTS / "simulate.png"))
    one("tab-chat").click()
    until(browser, lambda: one("model").text == "typist" and one("chat").is_displayed())
    assert not one("player").is_displayed()


def test_themes_and_panels_by_keyboard(browser):
    engine = browser.find_element(By.ID, "engine")
    assert engine.is_displayed()
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.CONTROL, "e")
    until(browser, lambda: not engine.is_displayed())
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.CONTROL, "e")
    until(browser, lambda: engine.is_displayed())

    def background():
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    colours = set()
    for _ in range(3):
        browser.find_element(By.ID, "theme").click()
        colours.add(background())
    assert len(colours) == 2


def test_the_page_fits_a_phone(browser):
    browser.set_window_size(500, 800)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True})
    try:
        browser.refresh()
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        assert not browser.find_element(By.ID, "engine").is_displayed()
        for name in ("tab-chat", "tab-simulate", "new-chat", "open-settings", "toggle-engine", "theme", "prompt", "send"):
            box = browser.find_element(By.ID, name).rect
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360, name
        browser.find_element(By.ID, "toggle-engine").click()
        until(browser, lambda: browser.find_element(By.ID, "engine").is_displayed())
        SHOTS.mkdir(parents=True, exist_ok=True)
        assert browser.save_screenshot(str(SHOTS / "phone.png"))
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.set_window_size(1360, 900)


def test_the_page_asks_for_a_key_and_uses_it(tmp_path):
    world = World(tmp_path, app=create_app, api_key="open sesame")
    driver = launch(tmp_path / "profile")
    try:
        driver.get(world.url)
        say(driver, "hello")
        until(driver, lambda: driver.find_element(By.ID, "settings").is_displayed())
        driver.switch_to.active_element.send_keys("open sesame", Keys.ENTER)
        until(driver, lambda: not driver.find_element(By.ID, "settings").is_displayed())
        driver.find_element(By.CSS_SELECTOR, "[data-again]").click()
        until(driver, lambda: answers(driver) and "sphere turns" in answers(driver)[-1].text)
    finally:
        driver.quit()
        world.close()
