"""A headless Chromium that opens pages as people do, with mouse, keyboard and screens of any width.

It is driven by its own protocol (https://chromedevtools.github.io/devtools-protocol) over a pipe, so that nothing but
the browser is needed: no driver, no port, no network.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

import pytest

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(FOUND is None, reason="no Chromium here")
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe"]
PATIENCE = 120  # seconds, on a busy machine

# Before a page's own scripts: keeps what goes wrong in them.
WATCH = """
window.problems = [];
addEventListener("error", e => problems.push(String(e.message)));
addEventListener("unhandledrejection", e => problems.push(String(e.reason)));
console.error = (...said) => problems.push(said.join(" "));
"""

# What can be said of every page: texts that are small or faint, what is wider than the screen, what was fetched.
LOOK = """(() => {
const rgb = text => { const x = text.match(/[\\d.]+/g).map(Number); return x.length > 3 ? x : [...x, 1]; };
const over = ([r, g, b, a], under) => [r, g, b].map((x, i) => a * x + (1 - a) * under[i]);
const behind = e => {  // the colour that stands behind an element's text
  if (!e) return [255, 255, 255];
  const own = rgb(getComputedStyle(e).backgroundColor);
  return own[3] === 1 ? own.slice(0, 3) : over(own, behind(e.parentElement));
};
const bright = c => { const [r, g, b] = c.map(x => (x /= 255) <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const contrast = e => {
  const style = getComputedStyle(e), under = behind(e);
  const ink = over(rgb(e instanceof SVGElement ? style.fill : style.color), under), two = [bright(ink), bright(under)];
  return (Math.max(...two) + 0.05) / (Math.min(...two) + 0.05);
};
const UNREAD = "script, style, noscript, option, details:not([open]) > :not(summary)";
const texts = [...document.querySelectorAll("body *")].filter(e => !e.closest(UNREAD)
  && !e.disabled && e.getBoundingClientRect().height
  && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
const size = e => parseFloat(getComputedStyle(e).fontSize) * (e instanceof SVGElement ?
  e.ownerSVGElement.getBoundingClientRect().width / e.ownerSVGElement.viewBox.baseVal.width : 1);
return { problems: window.problems, texts: texts.length,
  small: texts.filter(e => size(e) < 11.99).map(e => size(e) + e.outerHTML.slice(0, 90)).slice(0, 5),
  faint: texts.filter(e => contrast(e) < 4.5).map(e => contrast(e) + e.outerHTML.slice(0, 90)).slice(0, 5),
  overflow: document.documentElement.scrollWidth - innerWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  asked: performance.getEntriesByType("resource").filter(e => !/^(data|blob):/.test(e.name)).map(e => e.name) };
})()"""


class Browser:
    """A browser with one page."""

    def __init__(self):
        self._profile = tempfile.mkdtemp(prefix="hf_gallery_browser_")
        read, its_write = os.pipe()
        its_read, write = os.pipe()
        # Chromium reads its orders from descriptor 3 and answers on 4.
        script = f'exec "$0" "$@" 3<&{its_read} 4>&{its_write}'
        command = ["bash", "-c", script, FOUND, *ARGUMENTS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(its_read, its_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(its_read)
        os.close(its_write)
        self._read, self._write, self._rest, self._number, self._session = read, write, b"", 0, None
        pages = (x for x in self.call("Target.getTargets")["targetInfos"] if x["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=next(pages)["targetId"], flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method, **parameters):
        """The result of an order. Raises RuntimeError if the browser refuses it, TimeoutError if it says nothing."""
        self._number += 1
        order = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            order["sessionId"] = self._session
        os.write(self._write, json.dumps(order).encode() + b"\0")
        end = time.monotonic() + PATIENCE
        while True:
            answer = self._next(end - time.monotonic())
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self, patience):
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], max(0, patience))[0]:
                raise TimeoutError("the browser says nothing")
            more = os.read(self._read, 1 << 16)
            if not more:
                raise RuntimeError("the browser has gone")
            self._rest += more
        said, self._rest = self._rest.split(b"\0", 1)
        return json.loads(said)

    def open(self, path, width=1440, height=900, dark=False, media=""):
        """Shows a file on a screen of that width, in a colour scheme."""
        self.screen(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def screen(self, width, height):
        """Makes the screen so wide and so high."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def evaluate(self, script):
        """The value of an expression in the page, as JSON has it. Raises RuntimeError if it throws."""
        said = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in said:
            raise RuntimeError(said["exceptionDetails"].get("exception", said["exceptionDetails"]).get("description"))
        return said["result"].get("value")

    def wait(self, script):
        """Waits until an expression in the page is true. Raises TimeoutError where it does not become so."""
        end = time.monotonic() + PATIENCE
        while not self.evaluate(script):
            if time.monotonic() > end:
                raise TimeoutError(script)
            time.sleep(0.02)

    def press(self, key, shift=False):
        """Presses a key, and lets it go."""
        text = {"Enter": "\r", "Space": " "}.get(key, "")
        codes = {"Enter": 13, "Space": 32, "Tab": 9, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37}
        codes |= {"ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        name = " " if key == "Space" else key
        about = {"key": name, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": 8 * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def point(self, selector, click=False):
        """Moves the mouse onto the middle of an element, which is scrolled to, and clicks if asked."""
        script = """(() => {
            const e = document.querySelector(%s);
            e.scrollIntoView({ block: "center", inline: "center" });
            const box = e.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"""
        x, y = self.evaluate(script % json.dumps(selector))
        kinds = ["mouseMoved", *(["mousePressed", "mouseReleased"] if click else [])]
        for kind in kinds:
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def look(self):
        """Tells what can be told of every page, see `LOOK`."""
        return self.evaluate(LOOK)

    def picture(self, whole=False):
        """The page as a PNG: what the screen shows of it, or all of it."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def printed(self):
        """The page as it is printed, a PDF."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"])
