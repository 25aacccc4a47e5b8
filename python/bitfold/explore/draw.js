// Small helpers for the page: elements, numbers as text, and a picture that is drawn anew when its width changes.

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function shape(name, attributes = {}, text = "") {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

// A number as people read it: at most `digits` significant ones, a true minus sign.
function show(x, digits = 6) {
  if (Number.isNaN(x)) return "NaN";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
  if (Object.is(x, -0)) return "−0";
  const magnitude = Math.abs(x);
  const plain = magnitude === 0 || (magnitude >= 1e-4 && magnitude < 1e7);
  let text = plain ? String(Number(magnitude.toPrecision(digits))) : magnitude.toExponential(digits - 1);
  if (!plain) text = text.replace(/\.?0*e\+?(-?\d+)/, (_, power) => ` × 10${superscript(power)}`);
  return (x < 0 ? "−" : "") + text;
}

const superscript = (digits) => digits.replace(/[-\d]/g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);

const percent = (share) => `${(100 * share).toPrecision(3)}%`;

// Round steps of an axis from low to high: about `count` of them.
function steps(low, high, count) {
  const rough = (0.7 * (high - low)) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step + 0); // + 0: no −0
  return found;
}

// An axis at height y: a line, ticks and numbers, and what they count.
function axis(svg, { low, high, x, y, width, unit }) {
  svg.append(shape("path", { class: "axis", d: `M${x(low)} ${y}H${x(high)}` }));
  for (const tick of steps(low, high, Math.max(3, Math.floor(width / 90)))) {
    svg.append(shape("path", { class: "axis", d: `M${x(tick)} ${y}v5` }));
    svg.append(shape("text", { x: x(tick), y: y + 18, "text-anchor": "middle" }, show(tick, 6)));
  }
  svg.append(shape("text", { class: "unit", x: (x(low) + x(high)) / 2, y: y + 36, "text-anchor": "middle" }, unit));
}

// An SVG in `holder`, as wide as it, filled by draw(svg, width), which returns its height and what it shows in words.
function picture(holder, draw) {
  const svg = shape("svg", { role: "img" });
  holder.append(svg);
  const redraw = () => {
    const width = Math.max(280, Math.floor(holder.clientWidth));
    svg.replaceChildren();
    const { height, label } = draw(svg, width);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("width", width);
    svg.setAttribute("height", height);
    svg.setAttribute("aria-label", label);
  };
  let last = 0;
  new ResizeObserver(() => {
    if (holder.clientWidth === last) return;
    last = holder.clientWidth;
    redraw();
  }).observe(holder);
  return redraw;
}

// A table's body from rows of cells, the first of each row its header; `current` is marked.
function fill(body, rows, current = -1) {
  body.replaceChildren(
    ...rows.map(([name, ...cells], i) => {
      const row = element("tr", i === current ? { "aria-current": "true" } : {});
      row.append(element("th", { scope: "row" }, name), ...cells.map((cell) => element("td", {}, cell)));
      return row;
    }),
  );
}

function options(select, names, chosen) {
  select.append(...names.map((name) => element("option", { value: name }, name)));
  select.value = chosen;
}
