// What can be done with a page beyond reading it. Everything shown comes from the tables and figures in the page.
"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const makeSvg = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  document.documentElement.classList.add("js");

  // ---- tables: sort by a click, copy

  const number = (text) => Number.parseFloat(text.replaceAll(",", ""));

  function compare(one, other, sign) {
    const [a, b] = [number(one), number(other)];
    if (!Number.isNaN(a) && !Number.isNaN(b)) return sign * (a - b);
    if (!one.trim() || !other.trim()) return !one.trim() - !other.trim(); // empty cells are last
    return sign * one.localeCompare(other, "en", { numeric: true });
  }

  function sort(table, column) {
    const heads = [...table.tHead.rows[0].cells];
    const before = heads[column].getAttribute("aria-sort");
    const now = { none: "descending", descending: "ascending", ascending: "none" }[before];
    for (const head of all("th[aria-sort]", table)) head.setAttribute("aria-sort", head === heads[column] ? now : "none");
    const rows = table.rowsAtFirst.slice();
    if (now !== "none") {
      const keys = new Map(rows.map((row) => [row, row.cells[column].textContent]));
      rows.sort((one, other) => compare(keys.get(one), keys.get(other), now === "ascending" ? 1 : -1));
    }
    table.tBodies[0].append(...rows);
  }

  const cells = (table) => all("tr", table).map((row) => [...row.cells].map((cell) => cell.textContent.trim()));

  const csv = (table) => cells(table)
    .map((row) => row.map((text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text)).join(",") + "\n")
    .join("");

  function latex(table) {
    const signs = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "σ": "$\\sigma$", "τ": "$\\tau$" };
    const escape = (text) => text.replace(/[\\~^στ]|[&%$#_{}]/g, (sign) => signs[sign] || `\\${sign}`);
    const [head, ...body] = cells(table).map((row) => ` ${row.map(escape).join(" & ")} \\\\`);
    const align = [...table.tHead.rows[0].cells].map((cell) => (cell.classList.contains("n") ? "r" : "l")).join("");
    return ["\\begin{tabular}{" + align + "}", "\\toprule", head, "\\midrule", ...body, "\\bottomrule", "\\end{tabular}", ""].join("\n");
  }

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // no permission, or an old browser
      const area = make("textarea", "hidden");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  }

  for (const box of all("[data-table]")) {
    const table = box.querySelector("table");
    table.rowsAtFirst = [...table.tBodies[0].rows];
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      if (table.rowsAtFirst.length < 2 || head.tagName !== "TH") return;
      const button = make("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => sort(table, column));
    });
    box.append(document.getElementById("tools").content.cloneNode(true));
    for (const button of all("[data-copy]", box)) {
      button.addEventListener("click", async () => {
        await copy(button.dataset.copy === "csv" ? csv(table) : latex(table));
        box.querySelector("[role=status]").textContent = "copied";
      });
    }
  }

  // ---- figures: a legend that shows and hides, values at the pointer

  function addButton(list, press) {
    const button = make("button");
    button.type = "button";
    button.addEventListener("click", press);
    list.append(button);
    return button;
  }

  function startLegend(figure, hidden, redraw) {
    const items = all(".legend li", figure);

    function set(item, isHidden) {
      const key = item.dataset.series;
      hidden[isHidden ? "add" : "delete"](key);
      item.querySelector("button").setAttribute("aria-pressed", String(!isHidden));
      for (const group of all(`svg g[data-series="${key}"]`, figure)) group.classList.toggle("off", isHidden);
      redraw();
    }

    for (const item of items) {
      const content = [...item.childNodes];
      const button = addButton(item, () => set(item, !hidden.has(item.dataset.series)));
      button.append(...content);
      button.setAttribute("aria-pressed", "true");
    }
    if (items.length <= 6) return;
    for (const [text, isHidden] of [["Show all", false], ["Hide all", true]]) {
      const item = make("li");
      addButton(item, () => items.forEach((each) => set(each, isHidden))).textContent = text;
      figure.querySelector(".legend").append(item);
    }
  }

  function readPanel(table) {
    const [x, y, width, height] = table.dataset.panel.split(" ").map(Number);
    const keys = table.dataset.keys.split(" ").filter(Boolean);
    const head = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
    const rows = [...table.tBodies[0].rows].map((row) => ({
      x: Number(row.dataset.x), y: Number(row.dataset.y), key: row.dataset.series,
      texts: [...row.cells].map((cell) => cell.textContent.trim()),
    }));
    const title = table.caption.textContent;
    return { x, y, width, height, keys, head, rows, title, points: "y" in (table.tBodies[0].rows[0]?.dataset || {}) };
  }

  // what is shown at a row of a panel's table: a heading, and pairs of a series and its value
  function readAt(panel, row, hidden) {
    if (panel.points) return [row.texts[0], panel.head.slice(1).map((name, i) => ["", name, row.texts[i + 1]])];
    const values = panel.keys.map((key, i) => [key, panel.head[i + 1], row.texts[i + 1]]);
    const shown = values.filter(([key, , value]) => value && !hidden.has(key));
    return [`${panel.head[0]}: ${row.texts[0]}`, shown.sort((one, other) => number(other[2]) - number(one[2]))];
  }

  function startFigure(figure) {
    const svg = figure.querySelector(".canvas > svg");
    const box = figure.querySelector(".readout");
    const hidden = new Set();
    const cursor = makeSvg("line", { class: "cursor off" });
    svg.append(cursor);
    let current = null; // the panel and the row that are read

    function show(panel, row) {
      current = row ? [panel, row] : null;
      cursor.classList.toggle("off", !row);
      box.hidden = !row;
      if (!row) return;
      for (const [name, value] of Object.entries({ x1: row.x, x2: row.x, y1: panel.y, y2: panel.y + panel.height })) cursor.setAttribute(name, value);
      const [heading, values] = readAt(panel, row, hidden);
      box.replaceChildren(make("b", "", heading), ...values.map(([key, name, value]) => {
        const line = make("span");
        const swatch = key && figure.querySelector(`.legend [data-series="${key}"] .swatch`);
        if (swatch) line.append(swatch.cloneNode(true));
        line.append(make("bdi", "", name), make("i", "", value));
        return line;
      }));
      panel.area.setAttribute("aria-valuenow", panel.rows.indexOf(row));
      panel.area.setAttribute("aria-valuetext", [heading, ...values.map(([, name, value]) => `${name} ${value}`)].join("; "));
      const at = new DOMPoint(row.x, panel.y).matrixTransform(svg.getScreenCTM());
      const frame = figure.getBoundingClientRect();
      const canvas = box.parentElement;
      const left = at.x - frame.left + canvas.scrollLeft;
      const fits = at.x - frame.left + 14 + box.offsetWidth < frame.width;
      box.style.left = `${Math.max(canvas.scrollLeft, fits ? left + 14 : left - 14 - box.offsetWidth)}px`;
      box.style.top = `${Math.max(0, at.y - canvas.getBoundingClientRect().top + 6)}px`;
    }

    function nearest(panel, event) {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const distance = (row) => Math.abs(row.x - at.x) + (panel.points ? Math.abs(row.y - at.y) : 0);
      const rows = panel.rows.filter((row) => !hidden.has(row.key));
      return rows.reduce((best, row) => (best && distance(best) <= distance(row) ? best : row), null);
    }

    function onKey(panel, event) {
      const rows = panel.rows.filter((row) => !hidden.has(row.key));
      const now = current && current[0] === panel ? rows.indexOf(current[1]) : -1;
      const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 5, PageDown: -5, Home: -Infinity, End: Infinity };
      if (event.key === "Escape") return show(null, null);
      if (!(event.key in steps) || !rows.length) return undefined;
      event.preventDefault();
      return show(panel, rows[Math.min(rows.length - 1, Math.max(0, now + steps[event.key]))]);
    }

    for (const table of all("table[data-panel]", figure)) {
      const panel = readPanel(table);
      panel.area = makeSvg("rect", {
        class: "panel", x: panel.x, y: panel.y, width: panel.width, height: panel.height, tabindex: 0, role: "slider",
        "aria-label": `Values of ${panel.title}`, "aria-valuemin": 0, "aria-valuemax": panel.rows.length - 1,
        "aria-valuenow": 0, "aria-valuetext": "arrow keys read the values",
      });
      svg.append(panel.area);
      panel.area.addEventListener("pointermove", (event) => show(panel, nearest(panel, event)));
      panel.area.addEventListener("pointerdown", (event) => show(panel, nearest(panel, event)));
      panel.area.addEventListener("pointerleave", () => show(null, null));
      panel.area.addEventListener("blur", () => show(null, null));
      panel.area.addEventListener("keydown", (event) => onKey(panel, event));
    }
    startLegend(figure, hidden, () => current && show(...current));
  }

  all("[data-figure]").forEach(startFigure);

  // ---- galleries: filters

  for (const gallery of all("[data-gallery]")) {
    const form = gallery.querySelector(".filters");
    const cards = all(".cards > li", gallery);
    const count = gallery.querySelector("[role=status]");
    const field = (name) => form.elements[name];

    const apply = () => {
      const chosen = Number(field("deployed")?.value || 0);
      const least = Number(field("radius").value);
      let shown = 0;
      for (const card of cards) {
        const answers = all(".answer", card);
        answers.forEach((answer, i) => answer.classList.toggle("chosen", i === chosen));
        const { verdict, radius } = answers[chosen].dataset;
        const fits = (name, value) => !field(name)?.value || field(name).value === value;
        card.hidden = !(fits("class", card.dataset.class) && fits("verdict", verdict) && Number(radius) >= least);
        shown += !card.hidden;
      }
      form.querySelector("output").textContent = least.toFixed(2);
      count.textContent = `${shown} of ${cards.length} images shown`;
    };
    form.hidden = false;
    form.addEventListener("input", apply);
    form.addEventListener("change", apply);
    form.addEventListener("reset", () => setTimeout(apply));
    form.addEventListener("submit", (event) => event.preventDefault());
    apply();
  }
})();
