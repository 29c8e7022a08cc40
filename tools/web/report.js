// Draws the page of `vmbus-emu report` from the data in it. Plain functions; nothing is fetched.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (name) => document.getElementById(name);
  const SVG = "http://www.w3.org/2000/svg";
  const SERIES = 8;
  const actors = new Map(data.topology.actors.map((actor) => [actor.slot, actor]));
  const flows = new Map();
  const onPath = new Set(data.path);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function drawn(parent, tag, attributes, text) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  function time(ns) {
    if (ns < 1e3) return `${ns} ns`;
    if (ns < 1e6) return `${(ns / 1e3).toFixed(1)} µs`;
    if (ns < 1e9) return `${(ns / 1e6).toFixed(2)} ms`;
    return `${(ns / 1e9).toFixed(3)} s`;
  }

  function color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function nameOf(slot) {
    return actors.has(slot) ? actors.get(slot).name : `actor ${slot}`;
  }

  // -- head, findings, events ---------------------------------------------------------------------

  function showMeta() {
    const meta = data.meta;
    const missing = [meta.dropped ? `${meta.dropped.toLocaleString("en")} dropped` : "", meta.damage].filter(Boolean);
    byId("meta").textContent =
      `${meta.records.toLocaleString("en")} records in ${meta.seconds.toFixed(3)} s, ` +
      `${data.topology.channels.length} channels, ${(flows.size + data.flows.left_out).toLocaleString("en")} messages` +
      (missing.length ? `; ${missing.join(", ")}` : "");
  }

  function showFindings() {
    const list = byId("finding-list");
    for (const finding of data.findings) {
      const line = element("li", { class: "finding" }, element("b", {}, finding.kind), ` ${finding.text} `);
      for (const id of finding.flows) if (flows.has(id)) line.append(flowButton(id), " ");
      list.append(line);
    }
    if (!data.findings.length) list.append(element("li", { class: "finding fine" }, element("b", {}, "none"), " no rule was broken, nothing was lost or left open"));
  }

  function showInvariants() {
    const told = data.invariants;
    byId("invariants").textContent = `invariants: ${told.held} held, ${told.broken} broken, ${told.undecided.length} undecided`;
    byId("invariants").title = told.undecided.join("\n");
  }

  function flowButton(id) {
    const flow = flows.get(id);
    const button = element("button", { type: "button" }, `${id} ${flow.name}`);
    button.addEventListener("click", () => {
      choose(id);
      byId("messages").scrollIntoView();
      byId("time").focus({ preventScroll: true });
    });
    return button;
  }

  function table(parent, heads, rows) {
    const body = element("tbody");
    for (const row of rows) body.append(element("tr", {}, ...row.map((cell) => (cell instanceof Node ? cell : element("td", {}, String(cell))))));
    parent.replaceChildren(element("table", {}, element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))), body));
  }

  function showEvents() {
    const rows = Object.entries(data.meta.events).map(([name, count]) => [name, count.toLocaleString("en")]);
    table(byId("event-table"), ["event", "records"], rows);
  }

  // -- topology -----------------------------------------------------------------------------------

  const MOST_ROWS = 24;

  function showTopology() {
    const channels = data.topology.channels.slice(0, MOST_ROWS);
    const more = data.topology.channels.length - channels.length;
    const vps = data.topology.vps;
    const rows = Math.max(channels.length, vps.length * 2, 2);
    const height = 40 + rows * 24;
    const picture = document.createElementNS(SVG, "svg");
    picture.setAttribute("width", "860");
    picture.setAttribute("height", String(height + 10));
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", `The host, ${data.topology.channels.length} channels and ${vps.length} virtual processors`);
    const middle = 30 + (rows * 24) / 2;
    box(picture, 0, middle - 30, 146, 60, "hypervisor", "VMBus server, devices");
    channels.forEach((channel, index) => {
      const y = 36 + index * 24;
      const wire = channel.opened ? "wire open" : "wire";
      const group = drawn(picture, "g", {});
      drawn(group, "path", { class: wire, d: `M146 ${middle} C 200 ${middle}, 200 ${y}, 250 ${y}` });
      drawn(group, "rect", { class: "box", x: 250, y: y - 10, width: 290, height: 20, rx: 3 });
      drawn(group, "text", { x: 258, y: y + 4 }, `${channel.relid}  ${channel.class}${channel.sub ? ` sub ${channel.sub}` : ""}`);
      drawn(group, "text", { x: 532, y: y + 4, class: "dim", "text-anchor": "end" }, `${channel.connection}  ${channel.state}`);
      const at = vps.findIndex((vp) => vp.vp === channel.vp);
      if (at >= 0) {
        const to = 40 + ((at + 0.5) * rows * 24) / vps.length;
        drawn(group, "path", { class: wire, d: `M540 ${y} C 600 ${y}, 600 ${to}, 660 ${to}` });
      }
    });
    vps.forEach((vp, index) => {
      const y = 40 + ((index + 0.5) * rows * 24) / vps.length;
      box(picture, 660, y - 20, 150, 40, `VP ${vp.vp}`, cpuOf(vp.position));
    });
    byId("topology-picture").replaceChildren(picture);
    if (more > 0) byId("topology-picture").append(element("p", { class: "count" }, `and ${more} channels more`));
    const threads = data.topology.actors.map((actor) => `${actor.name} (${actor.kind}, pid ${actor.pid})`).join(", ");
    byId("topology-picture").append(element("p", { class: "count" }, `recorded: ${threads}`));
  }

  function cpuOf(position) {
    return `interrupt page ${position}`;
  }

  function box(parent, x, y, width, height, title, under) {
    drawn(parent, "rect", { class: "box", x, y, width, height, rx: 4 });
    drawn(parent, "text", { x: x + width / 2, y: y + height / 2 - 2, "text-anchor": "middle" }, title);
    drawn(parent, "text", { x: x + width / 2, y: y + height / 2 + 13, "text-anchor": "middle", class: "dim" }, under);
  }

  // -- messages -----------------------------------------------------------------------------------

  const LEFT = 172, RIGHT = 220, TOP = 46, ROW = 22, WIDEST = 150, NARROWEST = 100;
  let chosen = null;
  let current = 0;
  let playing = 0;

  function fillChooser() {
    const wanted = byId("filter").value.trim().toLowerCase();
    const select = byId("flow");
    select.replaceChildren();
    for (const flow of flows.values()) {
      const text = `${flow.id} ${flow.name} relid ${flow.relid}${flow.ended ? "" : " unfinished"}`;
      if (!text.toLowerCase().includes(wanted)) continue;
      select.append(element("option", { value: flow.id }, `${flow.to_guest ? "↓" : "↑"} ${flow.id.padEnd(6)} ${flow.name}${flow.relid ? ` ${flow.relid}` : ""}`));
    }
    const left = data.flows.left_out ? `; ${data.flows.left_out.toLocaleString("en")} more did not fit into this page` : "";
    byId("left-out").textContent = `${select.length} of ${flows.size} messages${left}`;
    if (chosen) select.value = chosen.id;
  }

  function choose(id, at = null) {
    const flow = flows.get(id);
    if (!flow) return;
    stop();
    chosen = flow;
    byId("flow").value = id;
    const first = flow.steps.length ? flow.steps[0][1] : 0;
    const slider = byId("time");
    slider.min = "0";
    slider.max = String(flow.steps.length ? flow.steps[flow.steps.length - 1][1] - first : 0);
    drawSequence(flow);
    const title = byId("flow-title");
    title.replaceChildren(element("b", {}, `${flow.id} ${flow.name}`), ` ${flow.to_guest ? "host to guest" : "guest to host"}${flow.relid ? `, relid ${flow.relid}` : ""}${flow.ended ? "" : ", not at its end"} `);
    if (flows.has(flow.cause)) title.append("because of ", flowButton(flow.cause), " ");
    const answers = flow.answers.filter((answer) => flows.has(answer));
    if (answers.length) title.append("answered by ");
    for (const answer of answers.slice(0, 8)) title.append(flowButton(answer), " ");
    moveTo(at === null ? Number(slider.max) : at);
  }

  function lanesOf(flow) {
    const lanes = new Map();
    for (const step of flow.steps) {
      const key = `${step[2]}/${step[3]}`;
      if (!lanes.has(key)) lanes.set(key, { index: lanes.size, actor: nameOf(step[2]), context: step[3] });
    }
    return lanes;
  }

  function drawSequence(flow) {
    const lanes = lanesOf(flow);
    const height = TOP + flow.steps.length * ROW + 16;
    // As wide as the window has room for, with what stands right of the last lane; it scrolls where that is too little.
    const room = (byId("sequence").clientWidth - LEFT - RIGHT) / Math.max(1, lanes.size);
    const width = Math.max(NARROWEST, Math.min(WIDEST, room));
    const whole = LEFT + lanes.size * width + RIGHT;
    const picture = document.createElementNS(SVG, "svg");
    picture.setAttribute("width", String(whole));
    picture.setAttribute("height", String(height));
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", `Steps of ${flow.name}: ${flow.steps.map((step) => `${step[0]} in ${nameOf(step[2])}`).join(", ")}`);
    const marker = drawn(drawn(picture, "defs", {}), "marker", { id: "head", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto-start-reverse" });
    drawn(marker, "path", { d: "M0 0 L8 4 L0 8 z", fill: "var(--accent)" });
    for (const lane of lanes.values()) {
      const x = LEFT + (lane.index + 0.5) * width;
      drawn(picture, "text", { x, y: 16, "text-anchor": "middle" }, lane.actor);
      drawn(picture, "text", { x, y: 31, "text-anchor": "middle", class: "dim" }, lane.context);
      drawn(picture, "line", { class: "lane", x1: x, x2: x, y1: TOP - 8, y2: height });
    }
    const first = flow.steps.length ? flow.steps[0][1] : 0;
    let before = null;
    flow.steps.forEach((step, index) => {
      const x = LEFT + (lanes.get(`${step[2]}/${step[3]}`).index + 0.5) * width;
      const y = TOP + index * ROW + 8;
      const group = drawn(picture, "g", { class: "step" });
      const path = onPath.has(step[0]);
      if (path && before && before.x !== x) drawn(group, "path", { class: "arrow", d: `M${before.x} ${before.y} L${x} ${y}`, "marker-end": "url(#head)" });
      drawn(group, "circle", { class: path ? "dot on-path" : "dot", cx: x, cy: y, r: path ? 4.5 : 3 });
      drawn(group, "text", { x: 4, y: y + 4, class: "dim" }, time(step[1] - first));
      const gap = index ? step[1] - flow.steps[index - 1][1] : 0;
      drawn(group, "text", { x: 160, y: y + 4, class: "dim", "text-anchor": "end" }, index ? `+${time(gap)}` : "");
      drawn(group, "text", { x: x + 9, y: y + 4 }, step[0] === step[4] ? step[0] : `${step[0]} · ${step[4]}`.slice(0, 42));
      if (path) before = { x, y };
    });
    drawn(picture, "line", { class: "now", id: "cursor", x1: 0, x2: whole, y1: 0, y2: 0 });
    byId("sequence").replaceChildren(picture);
  }

  function moveTo(at) {
    if (!chosen || !chosen.steps.length) return;
    const first = chosen.steps[0][1];
    current = 0;
    chosen.steps.forEach((step, index) => {
      if (step[1] - first <= at) current = index;
    });
    byId("time").value = String(at);
    byId("now").textContent = `${time(at)} (step ${current + 1} of ${chosen.steps.length})`;
    const step = chosen.steps[current];
    byId("said").textContent = `${step[0]} in ${nameOf(step[2])} (${step[3]}): ${step[4]} ${step[5]}`;
    byId("time").setAttribute("aria-valuetext", `${time(at)}, ${step[0]}`);
    document.querySelectorAll("#sequence .step").forEach((group, index) => group.classList.toggle("later", index > current));
    const y = TOP + current * ROW + 19 + between(at, first);
    const cursor = byId("cursor");
    cursor.setAttribute("y1", String(y));
    cursor.setAttribute("y2", String(y));
    history.replaceState(null, "", `#flow=${encodeURIComponent(chosen.id)}&t=${at}`);
  }

  // Between two rows the cursor stands where the time does.
  function between(at, first) {
    const next = chosen.steps[current + 1];
    if (!next) return 0;
    const from = chosen.steps[current][1] - first, to = next[1] - first;
    return to > from ? (ROW * (at - from)) / (to - from) : 0;
  }

  function hop(by) {
    if (!chosen) return;
    const to = Math.max(0, Math.min(chosen.steps.length - 1, current + by));
    moveTo(chosen.steps[to][1] - chosen.steps[0][1]);
  }

  function stop() {
    clearInterval(playing);
    playing = 0;
    byId("play").textContent = "play";
  }

  function play() {
    if (playing) return stop();
    if (chosen && current === chosen.steps.length - 1) moveTo(0);
    byId("play").textContent = "pause";
    playing = setInterval(() => {
      if (!chosen || current === chosen.steps.length - 1) return stop();
      hop(1);
    }, 400);
  }

  function wireMessages() {
    byId("filter").addEventListener("input", fillChooser);
    byId("flow").addEventListener("change", (event) => choose(event.target.value));
    byId("time").addEventListener("input", (event) => moveTo(Number(event.target.value)));
    byId("time").addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 5, PageDown: -5 }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      hop(by);
    });
    byId("back").addEventListener("click", () => hop(-1));
    byId("forth").addEventListener("click", () => hop(1));
    byId("play").addEventListener("click", play);
  }

  function chooseFirst() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const id = asked.get("flow");
    if (id && flows.has(id)) return choose(id, asked.has("t") ? Number(asked.get("t")) : null);
    const longest = [...flows.values()].find((flow) => flow.name === "OFFERCHANNEL" && flow.ended) || [...flows.values()][0];
    if (longest) choose(longest.id);
  }

  // -- charts -------------------------------------------------------------------------------------

  let charts = [];
  const hidden = new Set();

  function axes(labels) {
    return labels.map((label) => ({ label, stroke: color("--fg"), grid: { stroke: color("--line"), width: 0.5 }, ticks: { stroke: color("--line") }, size: label.startsWith("time") ? 44 : 64 }));
  }

  function chart(parent, options, values) {
    const width = Math.max(320, Math.min(1240, byId(parent).clientWidth));
    charts.push(new uPlot({ width, height: 300, ...options }, values, byId(parent)));
  }

  function showStages() {
    const us = (ns) => (ns / 1e3).toFixed(1);
    const longest = Math.max(1, ...data.stages.map((stage) => stage.p99));
    const rows = data.stages.map((stage) => {
      const bar = element("span");
      bar.style.width = `${(220 * stage.p99) / longest}px`;
      return [stage.name.replaceAll("_", " "), stage.count, us(stage.p50), us(stage.p90), us(stage.p99), us(stage["p99.9"]), us(stage.max), element("td", { class: "bar" }, bar)];
    });
    if (!rows.length) return byId("stage-table").replaceChildren("No round trip could be followed in this recording.");
    table(byId("stage-table"), ["stage", "count", "p50 µs", "p90 µs", "p99 µs", "p99.9 µs", "max µs", "p99"], rows);
  }

  function drawCharts() {
    for (const one of charts) one.destroy();
    charts = [];
    if (data.stages.length) {
      const series = data.stages.map((stage, index) => ({ label: stage.name.replaceAll("_", " "), stroke: color(`--s${index % SERIES}`), width: 1.5, dash: index >= SERIES ? [6, 4] : undefined, points: { show: true, size: 4 } }));
      chart("stage-chart", {
        scales: { x: { time: false }, y: { distr: 3 } },
        axes: axes(["percentile", "µs"]),
        series: [{ label: "percentile" }, ...series],
      }, [data.curve, ...data.stages.map((stage) => stage.curve.map((ns) => Math.max(ns, 1) / 1e3))]);
    }
    const shown = data.activity.actors.filter((actor) => !hidden.has(actor.slot));
    const ms = data.activity.actors.length ? data.activity.actors[0].records.map((_, n) => (n * data.activity.bucket_ns) / 1e6) : [];
    timeline("records-chart", shown, ms, (actor) => actor.records);
    timeline("busy-chart", shown.filter((actor) => actor.busy), ms, (actor) => actor.busy);
  }

  function timeline(parent, shown, ms, values) {
    if (!shown.length) return;
    const series = shown.map((actor) => ({ label: actor.name, stroke: color(`--s${actor.number % SERIES}`), width: 1.5, dash: actor.number >= SERIES ? [6, 4] : undefined, points: { show: false } }));
    chart(parent, { height: 220, scales: { x: { time: false } }, axes: axes(["time, ms", ""]), series: [{ label: "ms" }, ...series] }, [ms, ...shown.map(values)]);
  }

  function showProcessChoice() {
    data.activity.actors.forEach((actor, number) => {
      actor.number = number;
      const box = element("input", { type: "checkbox", checked: "" });
      box.addEventListener("change", () => {
        if (box.checked) hidden.delete(actor.slot);
        else hidden.add(actor.slot);
        drawCharts();
      });
      const swatch = element("span", { class: "swatch" });
      swatch.style.background = `var(--s${number % SERIES})`;
      byId("process-choice").append(element("label", {}, box, swatch, actor.name));
    });
  }

  // -- theme --------------------------------------------------------------------------------------

  function setTheme(isDark) {
    document.documentElement.classList.toggle("dark", isDark);
    byId("theme").setAttribute("aria-pressed", String(isDark));
    byId("theme").textContent = isDark ? "light" : "dark";
    drawCharts();
  }

  // Messages are most of the page, and say the same again and again: they are carried deflated.
  async function unpackFlows() {
    const packed = Uint8Array.from(atob(byId("flows").textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    for (const flow of JSON.parse(await new Response(stream).text())) flows.set(flow.id, flow);
  }

  function showMessages() {
    showMeta();
    showFindings();
    showInvariants();
    fillChooser();
    chooseFirst();
    document.documentElement.dataset.ready = "yes";
  }

  showTopology();
  showEvents();
  showStages();
  showProcessChoice();
  wireMessages();
  setTheme(dark.matches);
  unpackFlows()
    .catch((error) => byId("left-out").replaceWith(`The messages cannot be unpacked here: ${error}`))
    .then(showMessages);
  dark.addEventListener("change", (event) => setTheme(event.matches));
  byId("theme").addEventListener("click", () => setTheme(!document.documentElement.classList.contains("dark")));
  // The style sheet has paper light; charts are drawn with the colours of the moment.
  let darkOnScreen = false;
  window.addEventListener("beforeprint", () => {
    darkOnScreen = document.documentElement.classList.contains("dark");
    if (darkOnScreen) setTheme(false);
  });
  window.addEventListener("afterprint", () => {
    if (darkOnScreen) setTheme(true);
  });
  window.addEventListener("hashchange", () => {
    const asked = new URLSearchParams(location.hash.slice(1));
    if (asked.has("flow")) choose(asked.get("flow"), asked.has("t") ? Number(asked.get("t")) : null);
  });
  window.addEventListener("resize", () => {
    clearTimeout(setTheme.later);
    setTheme.later = setTimeout(drawCharts, 150);
  });
})();
