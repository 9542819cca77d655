"use strict";

// The curves of one task: metrics that the reader chooses, each in a panel as wide as there is room.
// Drawn here and not by matplotlib, so that letters keep their size on a narrow screen.

const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"];
const DASHES = ["", "7 3", "7 3 2 3", "2 3"];
const SOFT = "#6b7280";
const PANEL = { width: 300, height: 190, top: 8, bottom: 34, right: 10 };
const LETTER = 6.2;  // width of a digit, in pixels
const NAME_HEIGHT = 11;  // from one name beside the drawing to the next, in pixels
const FEW_POINTS = 20;  // up to so many, every point of a curve has a marker

const lookOf = (index) => ({ colour: COLOURS[index % 7], dash: DASHES[index % 4] });

// An element of the drawing.
function draw(parent, tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
}

const isNumber = (x) => typeof x === "number";

// ---- Axes ----

// Round numbers between two values, about `count` of them; whole ones where asked for.
function ticks(low, high, count, whole) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const round = whole ? [1, 2, 5, 10] : [1, 2, 2.5, 5, 10];
  let step = round.map((x) => x * power).find((x) => x >= raw * 0.999);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return { values: found, step };
}

function tickText(value, step) {
  if (value === 0) return "0";
  if (Math.abs(value) < 1e-3) return value.toExponential(step < Math.abs(value) / 10 ? 1 : 0);
  if (Math.abs(value) >= 1e4) return (value / 1000).toFixed(step < 1000 ? 1 : 0) + "k";
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const exact = Math.abs(step * 10 ** decimals - Math.round(step * 10 ** decimals)) < 1e-6;
  return value.toFixed(exact ? decimals : decimals + 1);
}

const extent = (values) => values.reduce(
  ([low, high], x) => [Math.min(low, x), Math.max(high, x)], [Infinity, -Infinity]);

// From the lowest to the highest of all values, with some room; never of no size.
function range(values) {
  let [low, high] = extent(values);
  if (!(high > low)) {
    const room = Math.abs(low) * 0.2 || 0.2;
    low -= room;
    high += room;
  }
  const room = (high - low) * 0.06;
  return [low - room, high + room];
}

// ---- One panel ----

// What is drawn of a metric: [{look, curve, points}] of each setting that has it.
function seriesOf(task, metric) {
  const found = [];
  task.settings.forEach((setting, index) => {
    const curve = setting.curves[metric];
    const points = setting.points[metric] || [];
    if (curve && (curve.steps.length || points.length)) {
      found.push({ look: lookOf(index), name: setting.name, curve, points });
    }
  });
  return found;
}

function allValues(series, bounds) {
  const values = Object.values(bounds);
  for (const { curve, points } of series) {
    for (const part of [curve.mean, curve.low, curve.high, curve.single]) values.push(...(part || []));
    for (const [, ...numbers] of points) values.push(...numbers);
  }
  return values.filter(isNumber);
}

function allSteps(series) {
  const steps = [];
  for (const { curve, points } of series) {
    steps.push(...curve.steps, ...points.map(([step]) => step));
  }
  return steps;
}

function drawPanel(parent, task, metric) {
  const series = seriesOf(task, metric);
  const bounds = task.bounds[metric] || {};
  const steps = allSteps(series);
  const values = allValues(series, bounds);
  const width = Math.max(PANEL.width, parent.clientWidth || 0);
  const svg = draw(parent, "svg", {
    width, height: PANEL.height, viewBox: "0 0 " + width + " " + PANEL.height, role: "img",
  });
  draw(svg, "title", {}, metric + " of " + task.task);
  if (!steps.length || !values.length) {
    draw(svg, "text", { x: 10, y: 30, class: "tick" }, "not logged");
    return;
  }
  const [yLow, yHigh] = range(values);
  const [lowest, highest] = task.ranges[metric] || [null, null];
  const ySteps = ticks(yLow, yHigh, 5, false);
  ySteps.values = ySteps.values.filter((value) =>
    (lowest === null || value > lowest - 1e-9) && (highest === null || value < highest + 1e-9));
  const labels = ySteps.values.map((value) => tickText(value, ySteps.step));
  const left = 12 + LETTER * Math.max(...labels.map((label) => label.length));
  const [first, last] = extent(steps);
  const xRoom = last > first ? (last - first) * 0.03 : 0.5;
  // Their names stand beside the drawing, where no curve and no interval crosses them.
  const longestName = Math.max(0, ...Object.keys(bounds).map((name) => name.length));
  const right = width - PANEL.right - LETTER * longestName;
  const scaleX = (right - left) / (last - first + 2 * xRoom);
  const scaleY = (PANEL.height - PANEL.top - PANEL.bottom) / (yHigh - yLow);
  const x = (step) => left + (step - first + xRoom) * scaleX;
  const y = (value) => PANEL.height - PANEL.bottom - (value - yLow) * scaleY;

  drawAxes(svg, { x, y, left, right, ySteps, labels, first, last, xRoom });
  for (const value of Object.values(bounds)) {
    draw(svg, "line", {
      x1: left, x2: right, y1: y(value), y2: y(value), stroke: SOFT,
      "stroke-dasharray": "1 3", class: "bound",
    });
  }
  for (const one of series) drawSeries(svg, one, x, y);
  let lowestName = -NAME_HEIGHT;
  const fromTop = Object.entries(bounds).sort(([, a], [, b]) => b - a);
  for (const [name, value] of fromTop) {
    lowestName = Math.max(y(value) + 4, lowestName + NAME_HEIGHT);
    draw(svg, "text", { x: right + 4, y: lowestName, class: "tick over" }, name);
  }
}

function drawAxes(svg, { x, y, left, right, ySteps, labels, first, last, xRoom }) {
  const floor = PANEL.height - PANEL.bottom;
  ySteps.values.forEach((value, i) => {
    draw(svg, "line", {
      x1: left, x2: right, y1: y(value), y2: y(value), stroke: "#e5e7eb",
    });
    draw(svg, "text", {
      x: left - 5, y: y(value) + 4, "text-anchor": "end", class: "tick",
    }, labels[i]);
  });
  const most = Math.max(2, Math.floor((right - left) / 70));
  const span = Math.max(last - first, 1);
  const steps = ticks(first - xRoom, first + span + xRoom, Math.min(most, span + 1), true);
  for (const step of steps.values.filter((step) => step <= last + xRoom)) {
    draw(svg, "text", {
      x: x(step), y: floor + 14, "text-anchor": "middle", class: "tick step",
    }, String(step));
  }
  draw(svg, "line", { x1: left, x2: right, y1: floor, y2: floor, stroke: "#9ca3af" });
  draw(svg, "text", {
    x: (left + right) / 2, y: PANEL.height - 4, "text-anchor": "middle", class: "tick",
  }, "step");
}

function drawSeries(svg, { look, name, curve, points }, x, y) {
  const path = (values) => values.map((value, i) => x(curve.steps[i]) + "," + y(value)).join(" ");
  const line = (values, attributes) => {
    draw(svg, "polyline", { points: path(values), fill: "none", stroke: look.colour, ...attributes });
  };
  if (curve.low) {
    const back = curve.steps.map((step, i) => x(step) + "," + y(curve.high[i])).reverse();
    draw(svg, "polygon", {
      points: path(curve.low) + " " + back.join(" "), fill: look.colour, "fill-opacity": 0.15,
    });
  }
  if (curve.single) line(curve.single, { "stroke-opacity": 0.3, "stroke-width": 0.8 });
  line(curve.mean, { "stroke-width": 1.8, "stroke-dasharray": look.dash, class: "curve" });
  if (curve.steps.length <= FEW_POINTS) {
    curve.mean.forEach((value, i) => {
      const dot = draw(svg, "circle", {
        cx: x(curve.steps[i]), cy: y(value), r: curve.steps.length === 1 ? 4 : 2.2,
        fill: look.colour, class: "dot",
      });
      draw(dot, "title", {}, name + "\nstep " + curve.steps[i] + ": " + value);
    });
  }
  for (const [step, value, low, high] of points) {
    if (isNumber(low) && isNumber(high)) {
      draw(svg, "line", {
        x1: x(step), x2: x(step), y1: y(low), y2: y(high), stroke: look.colour,
      });
    }
    const ring = draw(svg, "circle", {
      cx: x(step), cy: y(value), r: 3.5, fill: "#fff", stroke: look.colour, "stroke-width": 1.3,
      class: "held-out",
    });
    draw(ring, "title", {}, name + "\nheld-out, step " + step + ": " + value);
  }
}

// ---- The key ----

function addKey(parent, drawSign, text) {
  const entry = add(parent, "span");
  const sign = draw(entry, "svg", { width: 30, height: 12, viewBox: "0 0 30 12" });
  drawSign(sign);
  add(entry, "span", text);
}

function addLegend(parent, task) {
  const legend = add(parent, "div", null, "legend");
  const line = (attributes) => (svg) => draw(svg, "line", {
    x1: 1, x2: 29, y1: 6, y2: 6, "stroke-width": 2, ...attributes,
  });
  const several = task.settings.some((setting) => setting.num_seeds > 1);
  const alone = task.settings.some((setting) => setting.num_seeds === 1);
  if (task.settings.length > 1) {
    task.settings.forEach((setting, index) => {
      const { colour, dash } = lookOf(index);
      const seeds = setting.num_seeds > 1 ? " (" + setting.num_seeds + " seeds)" : "";
      addKey(legend, line({ stroke: colour, "stroke-dasharray": dash }), setting.name + seeds);
    });
  }
  addKey(legend, line({ stroke: SOFT }), "training steps, running mean over a tenth of the run");
  if (alone) addKey(legend, line({ stroke: SOFT, "stroke-opacity": 0.4, "stroke-width": 1 }), "each step");
  if (several) {
    addKey(legend, (svg) => draw(svg, "rect", {
      x: 1, y: 1, width: 28, height: 10, fill: SOFT, "fill-opacity": 0.25,
    }), "lowest to highest seed");
  }
  if (task.settings.some((setting) => Object.keys(setting.points).length)) {
    const bars = alone && several ? "95 % interval (one seed) or lowest to highest seed"
      : several ? "lowest to highest seed" : "95 % interval over questions";
    addKey(legend, (svg) => {
      draw(svg, "line", { x1: 15, x2: 15, y1: 0, y2: 12, stroke: SOFT });
      draw(svg, "circle", { cx: 15, cy: 6, r: 3.5, fill: "#fff", stroke: SOFT });
    }, "held-out questions, " + bars);
  }
  if (Object.keys(task.bounds).length) {
    addKey(legend, line({ stroke: SOFT, "stroke-dasharray": "1 3" }), "floor and ceiling");
  }
}

// ---- The chooser ----

// Metrics by what stands before their slash, each with a box to tick.
function addChooser(parent, task, chosen, redraw) {
  const details = add(parent, "details", null, "chooser");
  add(details, "summary", "choose metrics (" + task.metrics.length + " are logged)");
  const stages = new Map();
  for (const metric of task.metrics) {
    const stage = metric.split("/")[0];
    stages.set(stage, [...(stages.get(stage) || []), metric]);
  }
  for (const [stage, metrics] of stages) {
    const group = add(details, "fieldset");
    add(group, "legend", stage);
    for (const metric of metrics) {
      const label = add(group, "label");
      const box = add(label, "input");
      box.type = "checkbox";
      box.value = metric;
      box.checked = chosen.has(metric);
      box.addEventListener("input", () => {
        if (box.checked) chosen.add(metric); else chosen.delete(metric);
        redraw();
      });
      add(label, "span", metric.slice(stage.length + 1) || metric);
    }
  }
}

function addCurves(parent, task) {
  addLegend(parent, task);
  const chosen = new Set(task.chosen);
  const panels = document.createElement("div");
  panels.className = "panels";
  const redraw = () => {
    panels.replaceChildren();
    for (const metric of task.metrics.filter((name) => chosen.has(name))) {
      const figure = add(panels, "figure", null, "curve");
      add(figure, "figcaption", metric);
      drawPanel(add(figure, "div"), task, metric);
    }
  };
  addChooser(parent, task, chosen, redraw);
  parent.appendChild(panels);
  redraw();
  window.addEventListener("resize", redraw);
}
