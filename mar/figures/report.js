const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

// The only way text gets onto the page: as text.
function add(parent, tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  if (className) node.className = className;
  parent.appendChild(node);
  return node;
}

// A metric with three decimals, large ones with one; a count above 1 as it is.
function number(x) {
  if (x === null || x === undefined) return "–";
  if (Number.isInteger(x) && Math.abs(x) > 1) return String(x);
  return Math.abs(x) >= 10 ? x.toFixed(1) : x.toFixed(3);
}

// ---- Notes, tables, figures, setup ----

function addCell(line, cell, column) {
  const box = add(line, "td");
  box.dataset.column = column;  // shown before the value where the columns do not fit side by side
  const content = add(box, "span");
  if (Array.isArray(cell)) {
    const [value, low, high] = cell;
    content.textContent = number(value);
    if (typeof low === "number") add(content, "small", number(low) + " to " + number(high));
  } else if (typeof cell === "string") {
    content.textContent = cell;
    box.className = cell ? "words" : "empty";
  } else {
    content.textContent = column === "n" ? String(cell) : number(cell);
  }
}

function addTable(parent, table) {
  const section = add(parent, "section");
  add(section, "h2", table.title);
  add(section, "p", table.note, "note");
  const body = add(add(section, "div", null, "scroll"), "table");
  const head = add(body, "tr");
  for (const name of table.columns) add(head, "th", name);
  const seedRows = new Set(table.seed_rows || []);
  table.rows.forEach((row, i) => {
    const line = add(body, "tr", null, seedRows.has(i) ? "seed" : "");
    row.forEach((cell, index) => addCell(line, cell, table.columns[index]));
  });
}

document.title = "mar: " + data.title;
$("title").textContent = data.title;
for (const note of data.notes) add($("notes"), "div", note, "warn");
for (const table of data.tables) addTable($(table.leads ? "headline" : "tables"), table);
for (const { curves, figures } of data.tasks) {
  const section = add($("figures"), "section");
  add(section, "h2", data.tasks.length > 1 ? "Curves of " + curves.task : "Curves");
  addCurves(section, curves);
  const grid = add(section, "div", null, "figures");
  for (const [name, url] of Object.entries(figures)) {
    const image = add(add(grid, "figure"), "img");
    image.src = url;
    image.alt = name;
  }
}
if (!data.rollouts) document.querySelector("nav a[href='#rollouts']").hidden = true;
if (!$("tables").children.length) document.querySelector("nav a[href='#tables']").hidden = true;
const provenance = JSON.stringify(data.provenance, null, 2);
const setup = { ...data.configs, "environment and commit": provenance };
for (const [name, text] of Object.entries(setup)) {
  const details = add($("setup"), "details");
  add(details, "summary", name);
  add(details, "pre", text);
}

// ---- One completion ----

const isRepeated = (row, k) => Boolean(row.repeated && row.repeated[k]);

function verdict(row, k) {
  if (row.hits[k]) return "right";
  return isRepeated(row, k) ? "repeated" : "wrong";
}

function isOverconfident(row) {
  return !row.reason && row.confidences.some((q, k) => q !== null && q >= 0.7 && !row.hits[k]);
}

function componentText(row, names) {
  const lines = (row.components || []).map(
    (value, i) => (names[i] || "component " + (i + 1)) + " " + number(value));
  return lines.join("\n");
}

// Where in the text each answer stands: [{from, to, slot}]. Tags in the thinking do not count.
function answerSpans(row) {
  if (row.reason) return [];
  const spans = [];
  const afterThinking = row.text.replace(
    /^[\s\S]*?<\/think>/, (thinking) => " ".repeat(thinking.length));
  for (const match of afterThinking.matchAll(/<answer(\d*)>([\s\S]*?)<\/answer\1>/g)) {
    const from = match.index + match[0].indexOf(">") + 1;
    const slot = match[1] ? Number(match[1]) - 1 : 0;
    spans.push({ from, to: from + match[2].length, slot });
  }
  return spans;
}

// The text in pieces: cut where the advantage changes and where an answer begins or ends.
function pieces(row) {
  const spans = answerSpans(row);
  const shades = row.advantages || [];  // [[first character, advantage], ...]
  const cuts = new Set([0, row.text.length]);
  for (const [start] of shades) cuts.add(start);
  for (const span of spans) cuts.add(span.from).add(span.to);
  const edges = [...cuts].filter((cut) => cut <= row.text.length).sort((a, b) => a - b);
  return edges.slice(0, -1).map((from, i) => {
    const begun = shades.filter(([start]) => start <= from);
    const inside = spans.find((span) => span.from <= from && from < span.to);
    return {
      text: row.text.slice(from, edges[i + 1]),
      advantage: begun.length ? begun[begun.length - 1][1] : null,
      slot: inside ? inside.slot : null,
    };
  });
}

// `largest`: the largest advantage of the group, which gets the full shade. `names`: those of the
// reward's components.
function addCard(cards, row, largest, names) {
  const box = add(cards, "div", null, "card");
  const head = add(box, "h3", "reward " + number(row.reward));
  if (row.reason) add(head, "span", row.reason, "tag");
  head.title = componentText(row, names);
  const text = add(box, "pre");
  for (const piece of pieces(row)) {
    const span = add(text, "span", piece.text, piece.slot === null ? "" : verdict(row, piece.slot));
    if (piece.advantage === null) continue;
    const strength = Math.min(Math.abs(piece.advantage) / largest, 1) * 0.6;
    const colour = piece.advantage > 0 ? "0,114,178" : "213,94,0";
    span.style.background = "rgba(" + colour + "," + strength + ")";
    span.title = "advantage " + number(piece.advantage) + "\n" + componentText(row, names);
  }
  const list = add(box, "ul");
  row.answers.forEach((answer, k) => {
    const line = add(list, "li");
    add(line, "span", answer === null ? "–" : answer, row.reason ? "" : verdict(row, k));
    const q = row.confidences[k];
    add(line, "span", q === null || q === undefined ? "" : q.toFixed(2));
  });
  list.title = componentText(row, names);
}

// ---- The rollout browser ----

let chosen = null;

function showGroup(group, button) {
  for (const other of document.querySelectorAll("#prompts button")) {
    other.setAttribute("aria-pressed", String(other === button));
  }
  chosen = group;
  $("question").textContent = group.question + "  →  " + group.targets.join(", ");
  $("sides").replaceChildren();
  group.sides.forEach((rows, i) => {
    const side = add($("sides"), "div");
    const { run, components } = data.rollouts.sides[i];
    if (group.sides.length > 1) add(side, "h3", run + ", mean reward " + number(meanReward(rows)));
    const cards = add(side, "div", null, "cards");
    const sizes = rows.flatMap((row) => (row.advantages || []).map((a) => Math.abs(a[1])));
    const largest = Math.max(...sizes, 1e-6);
    for (const row of rows) addCard(cards, row, largest, components);
  });
}

const allRows = (group) => group.sides.flat();
const meanReward = (rows) => rows.reduce((sum, row) => sum + row.reward, 0) / rows.length;
const stepName = (group) => (group.stage === "eval" ? "held-out, " : "") + "step " + group.step;

function passesFilters(group) {
  const step = $("step").value;
  const needle = $("find").value.toLowerCase();
  const rows = allRows(group);
  const text = group.question + rows.map((row) => row.text).join(" ");
  const hasRepeat = (row) => row.answers.some((_, k) => isRepeated(row, k));
  return (step === "all" || stepName(group) === step) &&
    (!needle || text.toLowerCase().includes(needle)) &&
    (!$("failed").checked || rows.some((row) => row.reason)) &&
    (!$("repeats").checked || rows.some(hasRepeat)) &&
    (!$("over").checked || rows.some(isOverconfident));
}

function listPrompts() {
  const groups = data.rollouts.groups.filter(passesFilters);
  $("prompts").replaceChildren();
  $("count").textContent = groups.length + " of " + data.rollouts.groups.length + " prompts";
  let selected = null;  // the chosen group if it is still there, else the first
  for (const group of groups) {
    const button = add($("prompts"), "button", group.id);
    const means = group.sides.map((rows) => number(meanReward(rows)));
    add(button, "span", stepName(group) + " · " + means.join(" | "));
    button.onclick = () => showGroup(group, button);
    if (selected === null || group === chosen) selected = [group, button];
  }
  if (selected) {
    showGroup(...selected);
  } else {
    $("sides").replaceChildren();
    $("question").textContent = "No prompt passes these filters.";
  }
}

if (data.rollouts && data.rollouts.groups.length) {
  $("rollouts").hidden = false;
  for (const step of ["all", ...new Set(data.rollouts.groups.map(stepName))]) {
    add($("step"), "option", step);
  }
  $("sides").className = data.rollouts.sides.length > 1 ? "pair" : "";
  for (const id of ["step", "find", "failed", "repeats", "over"]) {
    $(id).addEventListener("input", listPrompts);
  }
  listPrompts();
}
