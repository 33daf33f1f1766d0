"use strict";
// Shows the images of report.html: the clusters, what to check, and neighbours. All text goes through textContent.

const DATA = JSON.parse(document.getElementById("data").textContent);
const { images, clusters, classes } = DATA;
const PER_PAGE = 24; // clusters that are shown at a time
const PER_ROW = 24; // images of a cluster, before the rest is asked for

const find = (id) => document.getElementById(id);
const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// --- thumbnails: each is a part of a sheet, which is decoded when one of its images is first shown

const sheetAddresses = [];

function sheetAddress(sheet) {
  if (!sheetAddresses[sheet]) {
    const bytes = Uint8Array.from(atob(DATA.sheets[sheet]), (sign) => sign.charCodeAt(0));
    sheetAddresses[sheet] = URL.createObjectURL(new Blob([bytes], { type: "image/webp" }));
  }
  return sheetAddresses[sheet];
}

function picture(tag, image) {
  const perSheet = DATA.columns ** 2;
  const sheet = Math.floor(image / perSheet);
  const place = image % perSheet;
  const element = make(tag, { className: "thumb" });
  element.style.backgroundImage = `url("${sheetAddress(sheet)}")`;
  element.style.backgroundSize = `calc(${DATA.columns} * var(--t)) auto`;
  const [column, row] = [place % DATA.columns, Math.floor(place / DATA.columns)];
  element.style.backgroundPosition = `calc(${-column} * var(--t)) calc(${-row} * var(--t))`;
  return element;
}

function thumb(image) {
  const element = picture("button", image);
  element.type = "button";
  element.title = images.name[image];
  element.setAttribute("aria-label", `${images.name[image]}, cluster ${images.cluster[image]}`);
  element.addEventListener("click", () => zoom(image));
  return element;
}

const thumbs = (list) => list.map(thumb);

// --- clusters

const members = clusters.size.map(() => []);
images.cluster.forEach((cluster, image) => members[cluster].push(image));

const unnamed = (cluster) => `cluster ${cluster}`;
const names = clusters.name.map((name, cluster) => (name === unnamed(cluster) ? "" : name));
const ticked = new Set();
const storageKey = `sssd-zoo names ${DATA.key}`;

const percent = (fraction) => `${Math.round(100 * fraction)}%`;
const commonest = (cluster) => (clusters.class ? classes[clusters.class[cluster]] : "");

function facts(cluster) {
  const parts = [count(clusters.size[cluster], "image")];
  if (clusters.class) parts.push(`${percent(clusters.purity[cluster])} ${commonest(cluster)}`);
  parts.push(`mean distance to the centre ${clusters.distance[cluster]}`);
  return parts.join(" · ");
}

const SORTS = {
  "number": null,
  "size, largest first": (a, b) => clusters.size[b] - clusters.size[a],
  "size, smallest first": (a, b) => clusters.size[a] - clusters.size[b],
  "tightest first": (a, b) => clusters.distance[a] - clusters.distance[b],
  "loosest first": (a, b) => clusters.distance[b] - clusters.distance[a],
  ...(clusters.purity && { "least pure first": (a, b) => clusters.purity[a] - clusters.purity[b] }),
  ...(DATA.nameable && { "unnamed first": (a, b) => Boolean(names[a]) - Boolean(names[b]) }),
};

function search(words) {
  // The clusters that match, each with the images to show: all where it matches itself, else those that do.
  const wanted = words.trim().toLowerCase();
  const number = /^(?:cluster\s*)?(\d+)$/.exec(wanted);
  const found = [];
  members.forEach((list, cluster) => {
    const own = number
      ? Number(number[1]) === cluster
      : `${names[cluster]}\n${commonest(cluster)}`.toLowerCase().includes(wanted);
    if (!wanted || own) {
      found.push({ cluster, list });
      return;
    }
    const matching = list.filter(
      (image) =>
        images.name[image].toLowerCase().includes(wanted) ||
        (images.truth && !number && classes[images.truth[image]].toLowerCase().includes(wanted)),
    );
    if (matching.length) found.push({ cluster, list: matching, part: true });
  });
  const order = SORTS[find("sort").value];
  return order ? found.sort((one, other) => order(one.cluster, other.cluster)) : found;
}

function row({ cluster, list, part }) {
  const first = list.length <= PER_ROW + 3 ? list.length : PER_ROW; // a button for the last few would be longer
  const strip = make("div", { className: "strip" }, ...thumbs(list.slice(0, first)));
  const rest = list.length - first;
  if (rest > 0) {
    const all = make("button", { type: "button", className: "rest", textContent: `${rest.toLocaleString("en")} more` });
    all.setAttribute("aria-label", `Show ${rest} more images of cluster ${cluster}`);
    all.addEventListener("click", () => {
      const added = thumbs(list.slice(first));
      all.replaceWith(...added);
      added[0].focus();
    });
    strip.append(all);
  }
  const sampled = clusters.size[cluster] - members[cluster].length;
  const said = [facts(cluster)];
  if (sampled) said.push(`${members[cluster].length.toLocaleString("en")} shown`);
  if (part) said.push(`${count(list.length, "match", "matches")}`);
  const title = make("h3", { textContent: `Cluster ${cluster}` });
  const head = make("div", { className: "head" });
  const card = make("article", { className: "cluster" }, head, strip);
  card.dataset.cluster = cluster;
  const told = make("span", { className: "facts", textContent: said.join(" · ") });
  if (!DATA.nameable) {
    head.append(title, told);
    return card;
  }
  const tick = make("input", { type: "checkbox", checked: ticked.has(cluster) });
  tick.addEventListener("change", () => {
    ticked[tick.checked ? "add" : "delete"](cluster);
    card.classList.toggle("ticked", tick.checked);
    tellNaming();
  });
  card.classList.toggle("ticked", tick.checked);
  const field = make("input", { type: "text", className: "name", placeholder: "name", maxLength: 200, value: names[cluster] });
  field.setAttribute("list", "known");
  field.setAttribute("aria-label", `Name of cluster ${cluster}`);
  field.addEventListener("input", () => {
    names[cluster] = field.value.trim();
    changed();
  });
  head.append(make("label", { className: "tick" }, tick, title), told, field);
  return card;
}

let found = [];
let drawn = 0;

function drawMore() {
  const next = found.slice(drawn, drawn + PER_PAGE);
  const cards = next.map(row);
  find("list").append(...cards);
  drawn += next.length;
  const left = found.length - drawn;
  find("more").hidden = left <= 0;
  find("more").textContent = `Show ${Math.min(left, PER_PAGE)} more of ${count(left, "cluster")}`;
  return cards;
}

function draw() {
  const words = find("search").value;
  found = search(words);
  drawn = 0;
  find("list").replaceChildren();
  drawMore();
  const matching = found.reduce((sum, each) => sum + (each.part ? each.list.length : 0), 0);
  find("found").textContent = !words.trim()
    ? count(found.length, "cluster")
    : found.length
      ? `${count(found.length, "cluster")} found${matching ? `, ${count(matching, "image")} by file or class` : ""}`
      : `Nothing is called “${words.trim()}” among the images shown.`;
}

// --- names

// Names are kept in the browser until the run has others. A browser may forbid that to pages from the disk: then they
// are lost with the page, which asks before it is closed.
let unsaved = false;
let kept = true;

function changed() {
  unsaved = true;
  try {
    localStorage.setItem(storageKey, JSON.stringify({ run: clusters.name, names }));
  } catch {
    kept = false;
  }
  tellNaming();
}

function restore() {
  let before = null;
  try {
    before = JSON.parse(localStorage.getItem(storageKey));
  } catch {
    kept = false;
  }
  if (!before || String(before.run) !== String(clusters.name) || before.names?.length !== names.length) return;
  before.names.forEach((name, cluster) => {
    unsaved ||= name !== names[cluster];
    names[cluster] = String(name);
  });
}

function tellNaming() {
  const given = names.filter(Boolean);
  const different = [...new Set(given)].sort();
  const answers = different.length + names.length - given.length;
  find("state").textContent =
    `${given.length} of ${count(names.length, "cluster")} named; the network gives ${count(answers, "answer")}` +
    (unsaved ? ", not saved yet" : "");
  find("merge").hidden = !ticked.size;
  find("common").placeholder = `one name for ${count(ticked.size, "cluster")}`;
  find("save").disabled = !given.length;
  find("known").replaceChildren(...different.map((name) => make("option", { value: name })));
}

function nameTicked(event) {
  event.preventDefault();
  const name = find("common").value.trim();
  if (!name || !ticked.size) return;
  for (const cluster of ticked) names[cluster] = name;
  find("common").value = "";
  untick();
  changed();
}

function untick() {
  ticked.clear();
  for (const card of find("list").children) {
    card.classList.remove("ticked");
    card.querySelector("input[type=checkbox]").checked = false;
    card.querySelector(".name").value = names[card.dataset.cluster];
  }
  tellNaming();
}

function save() {
  const cell = (text) => `"${String(text).replaceAll('"', '""')}"`;
  const lines = names.map((name, cluster) => [cluster, cell(name || unnamed(cluster)), clusters.size[cluster]].join(","));
  // The mark tells spreadsheets that it is UTF-8.
  const content = `\ufeffcluster,name,images\r\n${lines.join("\r\n")}\r\n`;
  const address = URL.createObjectURL(new Blob([content], { type: "text/csv;charset=utf-8" }));
  make("a", { href: address, download: "NAMES.csv" }).click();
  unsaved = false;
  tellNaming();
}

// --- one image

let zoomed = 0;

function zoom(image) {
  zoomed = image;
  const cluster = images.cluster[image];
  find("zoom-image").replaceChildren(picture("div", image));
  find("zoom-name").textContent = images.name[image];
  const row = `row ${images.row[image]}`;
  const parts = [...(images.name[image] === row ? [] : [row]), `cluster ${cluster}${names[cluster] ? ` (${names[cluster]})` : ""}`];
  if (images.truth) parts.push(`class ${classes[images.truth[image]]}`);
  parts.push(`distance to the centre ${images.distance[image]}, the median is ${DATA.median}`);
  find("zoom-facts").textContent = parts.join(" · ");
  find("zoom-near").replaceChildren(...thumbs(images.near[image]));
  const list = members[cluster];
  find("before").disabled = image === list[0];
  find("after").disabled = image === list[list.length - 1];
  if (!find("zoom").open) find("zoom").showModal();
}

function step(by) {
  const list = members[images.cluster[zoomed]];
  const next = list[list.indexOf(zoomed) + by];
  if (next !== undefined) zoom(next);
}

// --- images to check, and neighbours

function group(list, words) {
  return make("div", { className: "group" }, make("div", { className: "strip" }, ...thumbs(list)), make("p", { textContent: words }));
}

function fill(id, elements, nothing) {
  find(id).replaceChildren(...(elements.length ? elements : [make("p", { textContent: nothing })]));
}

function drawChecks() {
  const same = new Set(DATA.identical);
  const copies = DATA.copies.map((list) => {
    const exact = list.every((image) => same.has(image));
    return group(list, `${exact ? "Same bytes" : "Same picture"}: ${list.map((image) => images.name[image]).join(", ")}`);
  });
  fill("copies", copies, "None were found.");
  fill("outliers", thumbs(DATA.outliers), "None.");
  fill("empty", thumbs([...new Set([...DATA.dark, ...DATA.constant])].slice(0, 120)), "None were found.");
  const examples = DATA.examples.map((image) => {
    const strip = group([image, ...images.near[image].slice(0, 5)], images.name[image]);
    strip.querySelector(".thumb").classList.add("first");
    return strip;
  });
  fill("examples", examples, "None.");
}

function copyButtons() {
  for (const command of document.querySelectorAll("code.command")) {
    const words = command.textContent;
    const button = make("button", { type: "button", className: "copy", textContent: "Copy" });
    button.setAttribute("aria-label", `Copy: ${words}`);
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(words);
      button.textContent = "Copied";
    });
    if (navigator.clipboard) command.append(button);
  }
}

function start() {
  document.body.classList.toggle("sharp", DATA.side <= 40);
  find("sort").append(...Object.keys(SORTS).map((name) => make("option", { value: name, textContent: name })));
  if (DATA.nameable) {
    restore();
    find("naming").addEventListener("submit", nameTicked);
    find("untick").addEventListener("click", untick);
    find("save").addEventListener("click", save);
    window.addEventListener("beforeunload", (event) => unsaved && !kept && event.preventDefault());
    tellNaming();
  }
  find("search").addEventListener("input", draw);
  find("sort").addEventListener("change", draw);
  find("more").addEventListener("click", () => drawMore()[0].querySelector("input, button").focus());
  find("close").addEventListener("click", () => find("zoom").close());
  find("before").addEventListener("click", () => step(-1));
  find("after").addEventListener("click", () => step(1));
  find("zoom").addEventListener("click", (event) => event.target === find("zoom") && find("zoom").close());
  find("zoom").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  copyButtons();
  draw();
  drawChecks();
}

start();
