"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const classes = data.classes;
const IGNORE = 255;
const LAYERS = { photo: "Photo", label: "Label", prediction: "Prediction", errors: "Errors" };
const HIT = [0, 158, 115], MISSED = [230, 159, 0], EXTRA = [86, 100, 220], WRONG = [214, 40, 57];
const HATCH = [[236, 236, 236], [168, 168, 168]];
const state = { chosen: -1, left: "photo", right: "prediction", opacity: 0.75 };
const byId = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const fixed = (x, digits = 4) => (x === null ? "–" : x.toFixed(digits));
const whole = (x) => x.toLocaleString("en");
const percent = (x) => `${(100 * x).toFixed(x && x < 0.1 ? 2 : 1)}%`;
const rgb = (colour) => `rgb(${colour.join(",")})`;
const theme = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const swatch = (colour) => {
  const node = element("span", { class: "swatch", "aria-hidden": "true" });
  node.style.background = rgb(colour);
  return node;
};

function table(head, rows, attributes = {}, caption = "") {
  const body = element("tbody");
  for (const row of rows) {
    const cells = row.map((x, i) => (i ? element("td", {}, x) : element("th", { scope: "row" }, x)));
    body.append(element("tr", {}, ...cells));
  }
  const columns = head.map((x) => element("th", { scope: "col" }, x));
  const parts = [element("thead", {}, element("tr", {}, ...columns)), body];
  if (caption) parts.unshift(element("caption", {}, caption));
  return element("table", attributes, ...parts);
}

// Figures

function drawFigures() {
  byId("kicker").textContent = data.kicker;
  byId("title").textContent = data.title;
  const first = data.protocols[0];
  byId("sentence").textContent = `Protocol: ${first.sentence}.`;
  for (const [name, value] of Object.entries(first.figures)) {
    const pair = [element("dt", {}, name), element("dd", {}, fixed(value))];
    byId("tiles").append(element("div", {}, ...pair));
  }
  if (data.protocols.length < 2) return;
  const names = Object.keys(first.figures);
  const rows = data.protocols.map((p) => [p.name, ...names.map((n) => fixed(p.figures[n]))]);
  const caption = `All protocols; what follows is of ${first.name}.`;
  byId("protocols").append(table(["protocol", ...names], rows, {}, caption));
}

function drawClasses() {
  const order = [...classes.keys()];
  const key = byId("sort").value;
  const value = (k) => (key === "id" ? -k : classes[k][key] ?? -1);
  order.sort((a, b) => value(b) - value(a) || a - b);
  const total = classes.reduce((sum, c) => sum + c.pixels, 0) || 1;
  const boundary = classes.some((c) => c.boundary_iou !== undefined);
  const head = ["class", "IoU", "", "accuracy", ...(boundary ? ["boundary IoU", "boundary F"] : []), "pixels"];
  const rows = order.map((k) => {
    const c = classes[k];
    const name = element("button", { type: "button", class: "class-button", "data-class": k }, swatch(c.colour), c.name);
    name.setAttribute("aria-pressed", String(k === state.chosen));
    name.addEventListener("click", () => {
      choose(k === state.chosen ? -1 : k);
      byId("toolbar").scrollIntoView({ block: "nearest" });
    });
    const fill = element("span", { class: "bar-fill" });
    fill.style.width = `${100 * (c.iou ?? 0)}%`;
    const bar = element("span", { class: "bar-track", "aria-hidden": "true" }, fill);
    const edges = boundary ? [fixed(c.boundary_iou, 3), fixed(c.boundary_f, 3)] : [];
    return [name, c.iou === null ? "absent" : fixed(c.iou, 3), bar, fixed(c.accuracy, 3), ...edges, percent(c.pixels / total)];
  });
  const drawn = table(head, rows, { class: "bars" });
  for (const row of drawn.rows) {
    row.cells[2].classList.add("bar");
    for (const cell of [...row.cells].slice(3)) cell.classList.add("optional");
  }
  byId("classes").replaceChildren(drawn);
}

// Confusion matrix

const labelled = data.matrix.map((row) => row.reduce((sum, x) => sum + x, 0));
const cursor = { row: -1, column: -1 };
let drawMatrixPixels = () => {};

function cellText(i, j) {
  const count = data.matrix[i][j];
  if (!labelled[i]) return `${classes[i].name} has no labelled pixel.`;
  const share = percent(count / labelled[i]);
  const verb = i === j ? "found" : `predicted as ${classes[j].name}`;
  return `${classes[i].name}: ${share} ${verb} (${whole(count)} of ${whole(labelled[i])} pixels)`;
}

function drawMatrix() {
  const size = classes.length;
  const canvas = element("canvas", { tabindex: 0, role: "img", width: size, height: size });
  canvas.setAttribute("aria-label", `Confusion matrix of ${size} classes; arrow keys read its cells`);
  const context = canvas.getContext("2d");
  drawMatrixPixels = () => {
    const heat = theme("--heat").split(",").map(Number), paper = hex(theme("--card"));
    const pixels = context.createImageData(size, size);
    data.matrix.forEach((row, i) => row.forEach((count, j) => {
      const part = labelled[i] ? Math.sqrt(count / labelled[i]) : 0;
      const cell = 4 * (i * size + j);
      for (let c = 0; c < 3; c++) pixels.data[cell + c] = paper[c] + part * (heat[c] - paper[c]);
      pixels.data[cell + 3] = 255;
    }));
    context.putImageData(pixels, 0, 0);
  };
  drawMatrixPixels();
  const point = (i, j, event) => {
    cursor.row = i;
    cursor.column = j;
    byId("cell").textContent = cellText(i, j);
    if (event) showTip(cellText(i, j), event);
  };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const at = (part) => Math.min(Math.max(Math.floor(part * size), 0), size - 1);
    point(at((event.clientY - box.top) / box.height), at((event.clientX - box.left) / box.width), event);
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    const to = (old, step) => Math.min(Math.max(Math.max(old, 0) + step, 0), size - 1);
    point(to(cursor.row, cursor.row < 0 ? 0 : move[0]), to(cursor.column, cursor.column < 0 ? 0 : move[1]));
  });
  const names = (kind) => element("div", { class: kind, "aria-hidden": "true" }, ...classes.map((c) => element("span", {}, c.name)));
  const few = size <= 30;
  const ramp = element("i");
  ramp.style.background = "linear-gradient(to right, var(--card), rgb(var(--heat)))";
  byId("matrix").append(few ? names("rows") : element("span"), canvas);
  if (few) byId("matrix").append(names("columns"));
  byId("matrix").append(element("div", { class: "ramp" }, "0%", ramp, "100%"));
  drawConfusions();
}

function drawConfusions() {
  const pairs = [];
  data.matrix.forEach((row, i) => row.forEach((count, j) => {
    if (i !== j && count) pairs.push([count, i, j]);
  }));
  pairs.sort((a, b) => b[0] - a[0]);
  const rows = pairs.slice(0, 10).map(([count, i, j]) => [classes[i].name, classes[j].name, percent(count / labelled[i]), whole(count)]);
  const drawn = table(["label", "predicted as", "of the label", "pixels"], rows, {}, "The most frequent confusions");
  for (const row of drawn.rows) row.cells[1].classList.add("left");
  byId("confusions").append(drawn);
}

const hex = (text) => [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));

function showTip(text, event) {
  const tip = byId("tip");
  tip.textContent = text;
  tip.hidden = false;
  const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(left, 8)}px`;
  tip.style.top = `${event.clientY + 18 + tip.offsetHeight > window.innerHeight ? event.clientY - tip.offsetHeight - 10 : event.clientY + 18}px`;
}

function hideTip() {
  byId("tip").hidden = true;
}

// Charts

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * [1, 2, 5, 10].find((m) => m * unit >= raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

const plain = (x) => String(Number(x.toPrecision(4)));

/* series: {name, colour, points: [[x, y], ...]}; bars draws steps from 0. */
function chart(place, title, series, options = {}) {
  const { axis = "step", bars = false, height = 220 } = options;
  const points = series.flatMap((s) => s.points);
  if (!points.length) return;
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const low = options.low ?? Math.min(...ys), high = options.high ?? Math.max(...ys);
  const first = options.first ?? Math.min(...xs), last = options.last ?? Math.max(...xs);
  const caption = element("figcaption", {}, element("strong", {}, title));
  for (const s of series) {
    if (series.length < 2) break;
    const mark = element("span", { class: "mark" }, s.name);
    mark.style.setProperty("--mark", s.colour);
    caption.append(mark);
  }
  const readout = element("p", { class: "readout" });
  const figure = element("figure", { class: "chart" }, caption, readout);
  place.append(figure);

  function draw() {
    figure.querySelector("svg")?.remove();
    const width = Math.max(figure.clientWidth, 200);
    const box = { left: 44, right: width - 10, top: 8, bottom: height - 36 };
    const x = (v) => box.left + (v - first) / (last - first || 1) * (box.right - box.left);
    const y = (v) => box.bottom - (v - low) / (high - low || 1) * (box.bottom - box.top);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
    root.setAttribute("aria-label", `${title}: ${series.map((s) => `${s.name} ends at ${plain(s.points.at(-1)[1])}`).join("; ")}`);
    for (const v of ticks(low, high, 4)) {
      root.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y(v), y2: y(v) }));
      root.append(svg("text", { x: box.left - 6, y: y(v) + 4, "text-anchor": "end" }, plain(v)));
    }
    for (const v of ticks(first, last, width / 90)) {
      root.append(svg("text", { x: x(v), y: box.bottom + 16, "text-anchor": "middle" }, plain(v)));
    }
    root.append(svg("text", { x: box.right, y: height - 4, "text-anchor": "end" }, axis));
    for (const s of series) {
      if (bars) {
        const wide = Math.max(x(options.wide) - x(0) - 2, 1);
        for (const [a, b] of s.points) {
          root.append(svg("rect", { x: x(a) + 1, y: y(b), width: wide, height: box.bottom - y(b), fill: s.colour }));
        }
        continue;
      }
      const path = s.points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
      root.append(svg("path", { d: path, fill: "none", stroke: s.colour, "stroke-width": 2 }));
      if (s.points.length < 40) {
        for (const [a, b] of s.points) root.append(svg("circle", { cx: x(a), cy: y(b), r: 2.5, fill: s.colour }));
      }
    }
    const line = svg("line", { class: "cursor", y1: box.top, y2: box.bottom, visibility: "hidden" });
    root.append(line);
    root.addEventListener("pointermove", (event) => {
      const place = root.getBoundingClientRect();
      const at = first + ((event.clientX - place.left) * width / place.width - box.left) / (box.right - box.left) * (last - first);
      const near = (s) => s.points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
      const nearest = series.map((s) => [s, near(s)]);
      line.setAttribute("x1", x(nearest[0][1][0]));
      line.setAttribute("x2", x(nearest[0][1][0]));
      line.setAttribute("visibility", bars ? "hidden" : "visible");
      readout.textContent = bars
        ? options.say(nearest[0][1])
        : `${axis} ${plain(nearest[0][1][0])}: ${nearest.map(([s, p]) => `${s.name} ${plain(p[1])}`).join(", ")}`;
    });
    figure.insertBefore(root, readout);
  }
  draw();
  let width = figure.clientWidth;
  new ResizeObserver(() => {
    if (Math.abs(figure.clientWidth - width) < 2) return;
    width = figure.clientWidth;
    draw();
  }).observe(figure);
}

function drawCurves() {
  const curves = data.curves;
  byId("curves-section").hidden = !Object.keys(curves).length;
  const series = (names, colours) => names
    .filter((name) => curves[name])
    .map((name, i) => ({ name: name.split("/")[1], colour: colours[i], points: curves[name] }));
  const colours = ["var(--accent)", "var(--accent-2)"];
  chart(byId("curves"), "Training loss", series(["train/loss"], colours), { low: 0 });
  chart(byId("curves"), "Evaluation", series(["val/mIoU", "val/PA"], colours), { low: 0, high: 1 });
  chart(byId("curves"), "Learning rate", series(["train/learning_rate"], colours), { low: 0 });
}

// Images

function decode(text, size) {
  const bytes = atob(text), ids = new Uint8Array(size);
  let at = 0;
  for (let i = 0; i < bytes.length; i += 3) {
    const run = bytes.charCodeAt(i + 1) + 256 * bytes.charCodeAt(i + 2);
    ids.fill(bytes.charCodeAt(i), at, at + run);
    at += run;
  }
  return ids;
}

function colourAt(layer, label, prediction, hatched) {
  const chosen = state.chosen;
  if (layer !== "prediction" && label === IGNORE) return HATCH[hatched ? 0 : 1];
  if (layer === "errors") {
    if (chosen < 0) return label === prediction ? null : WRONG;
    if (label === chosen) return prediction === chosen ? HIT : MISSED;
    return prediction === chosen ? EXTRA : null;
  }
  const id = layer === "label" ? label : prediction;
  return chosen < 0 || id === chosen ? classes[id].colour : veil();
}

/* What covers the classes that are not chosen: far from the chosen one's colour. */
function veil() {
  const [r, g, b] = classes[state.chosen].colour;
  return 0.3 * r + 0.6 * g + 0.1 * b > 110 ? [20, 20, 20] : [240, 240, 240];
}

class Card {
  constructor(example) {
    this.example = example;
    const { width, height } = example;
    this.label = decode(example.label, width * height);
    this.prediction = decode(example.prediction, width * height);
    this.present = new Set(example.present);
    this.drawn = new Set([...this.label, ...this.prediction]);
    this.canvases = ["base", "top"].map((name) => element("canvas", { class: name, width, height, role: "img" }));
    this.tags = ["l", "r"].map((side) => element("span", { class: `tag ${side}`, "aria-hidden": "true" }));
    this.slider = element("input", { type: "range", min: 0, max: 100, value: 50 });
    const handle = element("span", { class: "handle", "aria-hidden": "true" }, "↔");
    this.stage = element("div", { class: "stage" }, ...this.canvases, ...this.tags, handle, this.slider);
    this.slider.addEventListener("input", () => this.stage.style.setProperty("--cut", `${this.slider.value}%`));
    const figure = `mIoU ${fixed(example.miou, 3)} · PA ${fixed(example.pa, 3)}`;
    const caption = element("figcaption", {}, element("span", {}, example.name), element("span", { class: "figure" }, figure));
    this.node = element("figure", { class: "card" }, this.stage, caption);
    this.photo = new Image();
    this.photo.src = example.photo;
  }

  paint() {
    this.node.hidden = state.chosen >= 0 && !this.present.has(state.chosen);
    if (this.node.hidden) return;
    [state.left, state.right].forEach((layer, i) => {
      this.paintLayer(this.canvases[i], layer);
      this.canvases[i].setAttribute("aria-label", `${LAYERS[layer]} of ${this.example.name}`);
      this.tags[i].textContent = LAYERS[layer];
    });
    this.slider.setAttribute("aria-label", `${this.example.name}: ${LAYERS[state.left]} left of the line, ${LAYERS[state.right]} right of it`);
  }

  paintLayer(canvas, layer) {
    const { width, height } = this.example;
    const context = canvas.getContext("2d");
    context.globalAlpha = 1;
    context.drawImage(this.photo, 0, 0, width, height);
    if (layer === "photo") return;
    const mask = context.createImageData(width, height);
    for (let i = 0, y = 0; y < height; y++) {
      for (let x = 0; x < width; x++, i++) {
        const colour = colourAt(layer, this.label[i], this.prediction[i], (x + y) % 8 < 3);
        if (!colour) continue;
        mask.data.set(colour, 4 * i);
        mask.data[4 * i + 3] = 255;
      }
    }
    const painted = element("canvas", { width, height });
    painted.getContext("2d").putImageData(mask, 0, 0);
    context.globalAlpha = state.opacity;
    context.drawImage(painted, 0, 0);
  }
}

const cards = data.examples.map((example) => new Card(example));

function drawGroups() {
  for (const [group, title] of [["best", "Best"], ["median", "Around the median"], ["worst", "Worst"]]) {
    const own = cards.filter((card) => card.example.group === group);
    if (!own.length) continue;
    const list = element("div", { class: "cards" }, ...own.map((card) => card.node));
    byId("groups").append(element("div", { class: "group" }, element("h3", {}, title), list));
  }
}

function paint() {
  cards.forEach((card) => card.paint());
  for (const group of document.querySelectorAll(".group")) {
    group.hidden = !group.querySelector(".card:not([hidden])");
  }
  const seen = cards.filter((card) => !card.node.hidden).length;
  const name = state.chosen < 0 ? "" : classes[state.chosen].name;
  byId("shown").textContent = name
    ? `${name} occurs in ${seen} of the ${cards.length} images`
    : `${cards.length} images`;
  drawKey(name);
  byId("class").value = state.chosen;
  for (const button of document.querySelectorAll(".class-button")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.class) === state.chosen));
  }
}

function drawKey(name) {
  const entries = [];
  if ([state.left, state.right].includes("errors")) {
    if (name) entries.push([HIT, `${name}, found`], [MISSED, `${name}, missed`], [EXTRA, `${name} where it is not`]);
    else entries.push([WRONG, "wrong"]);
  }
  if ([state.left, state.right].some((layer) => layer === "label" || layer === "prediction")) {
    const drawn = new Set(cards.flatMap((card) => [...card.drawn]));
    const listed = state.chosen < 0 ? [...classes.keys()].filter((k) => drawn.has(k)) : [state.chosen];
    if (listed.length <= 40) entries.push(...listed.map((k) => [classes[k].colour, classes[k].name]));
    if (name) entries.push([veil(), "other classes"]);
  }
  byId("key").replaceChildren(...entries.map(([colour, text]) => element("li", {}, swatch(colour), text)));
}

function choose(k) {
  state.chosen = k;
  paint();
}

function drawHistogram() {
  const values = data.per_image;
  const bins = 20, counts = new Array(bins).fill(0);
  for (const v of values) counts[Math.min(Math.floor(v * bins), bins - 1)]++;
  const points = counts.map((n, i) => [i / bins, n]);
  const say = ([from, n]) => `${n} images with mIoU ${from.toFixed(2)} to ${(from + 1 / bins).toFixed(2)}`;
  chart(byId("histogram"), "Images by their own mIoU", [{ name: "images", colour: "var(--accent)", points }], {
    axis: "mIoU of the image", bars: true, height: 150, wide: 1 / bins, low: 0, first: 0, last: 1, say,
  });
}

function connect() {
  const option = (value, text) => element("option", { value }, text);
  byId("class").append(option(-1, "all"), ...classes.map((c, k) => option(k, c.name)));
  for (const side of ["left", "right"]) {
    byId(side).append(...Object.entries(LAYERS).map(([value, text]) => option(value, text)));
    byId(side).value = state[side];
    byId(side).addEventListener("change", (event) => {
      state[side] = event.target.value;
      paint();
    });
  }
  byId("class").addEventListener("change", (event) => choose(Number(event.target.value)));
  byId("opacity").addEventListener("input", (event) => {
    state.opacity = event.target.value / 100;
    paint();
  });
  byId("toolbar").addEventListener("submit", (event) => event.preventDefault());
  byId("sort").addEventListener("change", drawClasses);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawMatrixPixels());
}

byId("images-note").textContent = data.images_note;
drawFigures();
drawClasses();
drawMatrix();
drawCurves();
drawHistogram();
drawGroups();
connect();
Promise.all(cards.map((card) => card.photo.decode())).then(() => {
  paint();
  document.documentElement.dataset.ready = "true";
});
