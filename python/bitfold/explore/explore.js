// Four of the five parts of the page (the other is in features.js). Each reads its controls, computes with numbers.js and draws with draw.js.

const find = (id) => document.getElementById(id);

// ---- the number line ----

function numberLine() {
  // Densest first. Formats with a scale are drawn with the one that a largest weight of 1 gives.
  const scaled = ["int8", "int4", "nf4", "fp4"].map((name) => {
    const format = formats.get(name);
    const scale = scaleFor(format, 1);
    return { name, bits: format.bits, kind: "grid", ...tableLine(format.sorted.map((v) => Math.fround(v * scale))) };
  });
  const rows = tables.floats.map((layout) => {
    const table = formats.get(layout.name);
    const line = table ? tableLine(table.sorted) : floatLine(layout);
    return { name: layout.name, bits: layout.bits, kind: "floats", ...line };
  });
  rows.push(...scaled);
  const input = find("line-x");
  const zoom = find("line-zoom");

  const view = () => {
    const number = Number(input.value);
    const half = 2 ** -Number(zoom.value);
    const centre = half === 1 ? 0 : number;
    return { number, low: centre - half, high: centre + half };
  };

  const redraw = picture(find("line-picture"), (svg, width) => {
    const { number, low, high } = view();
    const left = 74;
    const right = width - 10;
    const row = 30;
    const x = (value) => left + ((value - low) / (high - low)) * (right - left);
    rows.forEach(({ name, kind, count }, i) => {
      const y = 8 + i * row;
      svg.append(shape("text", { x: left - 12, y: y + 15, "text-anchor": "end" }, name));
      let path = "";
      for (let pixel = left; pixel < right; pixel++) {
        const start = low + ((pixel - left) / (right - left)) * (high - low);
        const stop = low + ((pixel + 1 - left) / (right - left)) * (high - low);
        if (count(start, stop) > 0) path += `M${pixel + 0.5} ${y}v20`;
      }
      svg.append(shape("path", { class: "rule", d: `M${left} ${y + 20.5}H${right}` }));
      svg.append(shape("path", { class: kind, d: path }));
    });
    const bottom = 8 + rows.length * row;
    if (number >= low && number <= high) {
      svg.append(shape("path", { class: "probe", "stroke-dasharray": "3 3", d: `M${x(number)} 0V${bottom}` }));
    }
    axis(svg, { low, high, x, y: bottom, width, unit: "value" });
    const counts = rows.map((one) => `${one.name} ${show(one.count(low, high), 6)}`).join(", ");
    return { height: bottom + 42, label: `Values between ${show(low)} and ${show(high)}: ${counts}` };
  });

  const update = () => {
    const { number, low, high } = view();
    find("line-zoom-text").value = `${show(2 ** Number(zoom.value), 4)}×`;
    fill(
      find("line-table"),
      rows.map(({ name, bits, nearest, count }) => {
        const value = nearest(number);
        return [name, bits, show(value, 9), show(value - number, 3), count(low, high).toLocaleString("en")];
      }),
    );
    redraw();
  };
  for (const control of [input, zoom]) control.addEventListener("input", update);
  update();
}

// ---- bits ----

function bitToggles() {
  const names = [...tables.floats.map(({ name }) => name), "int8", "int4", "nf4", "fp4"];
  const select = find("bits-format");
  const input = find("bits-number");
  const row = find("bits-row");
  options(select, names, "fp16");
  let code = 0;

  const layout = () => layouts.get(select.value);
  const table = () => formats.get(select.value);
  const width = () => (layout() ?? table()).bits;
  const value = (of) => (table() ? table().values[of] : floatValue(layout(), of));
  const codeOf = (number) => {
    if (!table()) return floatCode(layout(), number);
    return table().codes[nearestPlace(table(), Math.fround(number))];
  };
  const field = (bit) => {
    if (!layout()) return "code";
    if (bit === width() - 1) return "sign";
    return bit >= layout().mantissa ? "exponent" : "mantissa";
  };

  const build = () => {
    const bits = Array.from({ length: width() }, (_, i) => width() - 1 - i);
    row.replaceChildren(
      ...bits.map((bit) => {
        const starts = bit < width() - 1 && field(bit) !== field(bit + 1);
        const button = element("button", {
          type: "button",
          class: `${field(bit)}${starts ? " starts-field" : ""}`,
          "data-bit": bit,
        });
        button.addEventListener("click", () => set(bit, !isSet(bit)));
        button.addEventListener("keydown", (event) => key(event, bit));
        return button;
      }),
    );
    const fields = [...new Set(bits.map(field))];
    const count = (name) => bits.filter((bit) => field(bit) === name).length;
    find("bits-legend").replaceChildren(
      ...fields.map((name) => element("span", { class: name }, `${name}: ${count(name)} bit${count(name) > 1 ? "s" : ""}`)),
    );
    update();
  };
  const isSet = (bit) => Math.floor(code / 2 ** bit) % 2 === 1;
  const set = (bit, on) => {
    if (isSet(bit) !== on) code += on ? 2 ** bit : -(2 ** bit);
    if (Number.isFinite(value(code))) input.value = String(value(code));
    update();
  };
  const key = (event, bit) => {
    const step = { ArrowLeft: 1, ArrowRight: -1 }[event.key];
    if (step) row.querySelector(`[data-bit="${bit + step}"]`)?.focus();
    else if (event.key === "0" || event.key === "1") set(bit, event.key === "1");
    else return;
    event.preventDefault();
  };

  const update = () => {
    for (const button of row.children) {
      const bit = Number(button.dataset.bit);
      button.textContent = isSet(bit) ? "1" : "0";
      button.setAttribute("aria-pressed", isSet(bit));
      button.setAttribute("aria-label", `bit ${bit}, ${field(bit)}`);
    }
    const now = value(code);
    const output = find("bits-value");
    output.value = show(now, 9);
    output.dataset.value = Object.is(now, -0) ? "-0" : String(now);
    find("bits-formula").textContent = table() && !layout() ? codeFormula(now) : floatFormula(now);
    const finite = Number.isFinite(now);
    fill(find("bits-table"), [
      ["next value below", finite ? show(neighbour(now, -1), 9) : ""],
      ["next value above", finite ? show(neighbour(now, 1), 9) : ""],
      ["code", `${code}, 0x${code.toString(16).padStart(Math.ceil(width() / 4), "0")}`],
    ]);
  };
  const codeFormula = () => {
    const { name, grid, bits } = table();
    if (grid === "integer") return `code ${code} − ${2 ** (bits - 1)}, times the scale of its group`;
    return `entry ${code} of the ${name} table, times the scale of its group`;
  };
  const floatFormula = (now) => {
    const { exponent, mantissa, bias, bits } = layout();
    const stored = Math.floor(code / 2 ** mantissa) % 2 ** exponent;
    const fraction = code % 2 ** mantissa;
    const sign = code >= 2 ** (bits - 1) ? "−" : "+";
    if (!Number.isFinite(now)) return "not a finite number";
    if (stored === 0) return `${sign} 2^${show(1 - bias)} × ${fraction}/${2 ** mantissa}: ${fraction ? "subnormal" : "zero"}`;
    return `${sign} 2^(${stored} − ${bias}) × (1 + ${fraction}/${2 ** mantissa})`;
  };
  const neighbour = (from, step) => {
    if (table()) return table().sorted[table().sorted.indexOf(from) + step] ?? NaN;
    const magnitude = floatCode(layout(), Math.abs(from));
    const place = (from < 0 ? -magnitude : magnitude) + step;
    return floatValue(layout(), Math.abs(place) + (place < 0 ? 2 ** (width() - 1) : 0));
  };

  const type = () => {
    code = codeOf(Number(input.value));
    update();
  };
  select.addEventListener("change", () => {
    code = codeOf(Number(input.value));
    build();
  });
  input.addEventListener("input", type);
  code = codeOf(Number(input.value));
  build();
}

// ---- the example's weights, shared by the last two parts ----

const example = { on: false, size: 16 };

function currentWeights() {
  const weights = Float32Array.from(tables.weights);
  if (example.on) {
    tables.outliers.forEach((place, i) => {
      weights[place] = (i % 2 ? -1 : 1) * example.size * tables.sigma;
    });
  }
  return weights;
}

function switchOutliers(on) {
  example.on = on;
  for (const id of ["outliers-on", "scales-outliers"]) find(id).checked = on;
}

const SHOWN_SIGMAS = 4; // either side of zero in the histogram
const BINS = 64;

function outlierHistogram() {
  const select = find("outliers-format");
  options(select, [...formats.keys()], "int4");
  const measure = () => {
    const format = formats.get(select.value);
    const weights = currentWeights();
    const result = quantize(format, weights, weights.length);
    const used = new Set([...weights.keys()].filter((i) => !tables.outliers.includes(i)).map((i) => result.places[i]));
    const values = format.sorted.map((value) => Math.fround(value * result.scales[0]));
    const near = values.filter((value) => Math.abs(value) <= 3 * tables.sigma).length;
    return { format, weights, result, used: used.size, values, near };
  };

  const redraw = picture(find("outliers-picture"), (svg, width) => {
    const { format, weights, result, values, near } = measure();
    const reach = SHOWN_SIGMAS * tables.sigma;
    const [left, right, top, bottom] = [10, width - 10, 26, 230];
    const x = (value) => left + ((value + reach) / (2 * reach)) * (right - left);
    const counts = new Array(BINS).fill(0);
    for (const weight of weights) {
      const bin = Math.floor(((weight + reach) / (2 * reach)) * BINS);
      if (bin >= 0 && bin < BINS) counts[bin] += 1;
    }
    const tallest = Math.max(...counts);
    const y = (count) => bottom - (count / tallest) * (bottom - top - 10);
    const edge = (i) => x(-reach + (2 * reach * i) / BINS);
    let area = `M${left} ${bottom}`;
    counts.forEach((count, i) => (area += `V${y(count)}H${edge(i + 1)}`));
    svg.append(shape("path", { class: "area", d: `${area}V${bottom}Z` }));
    const visible = values.filter((value) => Math.abs(value) <= reach);
    const length = visible.length > 100 ? 18 : bottom - top;
    svg.append(shape("path", { class: "grid", d: visible.map((value) => `M${x(value)} ${bottom}v${-length}`).join("") }));
    if (example.on) {
      const note = `outliers at ${example.size} σ: beyond both edges`;
      svg.append(shape("text", { class: "note", x: right, y: 14, "text-anchor": "end" }, note));
    }
    axis(svg, { low: -SHOWN_SIGMAS, high: SHOWN_SIGMAS, x: (s) => x(s * tables.sigma), y: bottom, width, unit: "weight (σ)" });
    const label = `Histogram of the weights with the ${visible.length} values of ${format.name} between −4 σ and 4 σ; ` +
      `${near} lie within 3 σ, relative error ${percent(result.relative)}`;
    return { height: bottom + 42, label };
  });

  const update = () => {
    const { format, result, used, near } = measure();
    find("outliers-size-text").value = `${example.size} σ`;
    find("outliers-size").disabled = !example.on;
    const error = element("span", { id: "outliers-error", "data-value": result.relative }, percent(result.relative));
    fill(find("outliers-table"), [
      ["largest weight", `${show(format.top * result.scales[0], 4)} = ${show((format.top * result.scales[0]) / tables.sigma, 3)} σ`],
      ["scale", show(result.scales[0], 6)],
      ["values within 3 σ", `${near} of ${format.sorted.length}`],
      ["values that the ordinary weights use", used],
      ["relative error", error],
    ]);
    redraw();
  };
  select.addEventListener("change", update);
  return update;
}

// ---- one scale, many scales ----

function scaleGroups() {
  const select = find("scales-format");
  const slider = find("scales-group");
  options(select, [...formats.keys()], "int4");
  const chosen = () => tables.groups[Number(slider.value)];

  const redraw = picture(find("scales-picture"), (svg, width) => {
    const format = formats.get(select.value);
    const weights = currentWeights();
    const { scales, relative } = quantize(format, weights, chosen());
    const largest = weights.reduce((most, weight) => Math.max(most, Math.abs(weight)), 0);
    const [left, right, top, bottom] = [42, width - 8, 24, 290];
    const x = (i) => left + (i / weights.length) * (right - left);
    const y = (value) => (top + bottom) / 2 - (value / (1.18 * largest)) * ((bottom - top) / 2);
    let lines = "";
    scales.forEach((scale, group) => {
      const [start, stop] = [x(group * chosen()), x((group + 1) * chosen())];
      const reach = format.top * scale;
      svg.append(shape("rect", { class: "band", x: start, y: y(reach), width: stop - start, height: y(-reach) - y(reach) }));
      const apart = y(0) - y((2 * reach) / format.sorted.length); // pixels between values, on average
      const shown = apart < 1 ? [-format.top, 0, format.top] : format.sorted;
      for (const value of shown) lines += `M${start + 0.5} ${y(value * scale)}H${stop - 0.5}`;
    });
    svg.append(shape("path", { class: "grid", "stroke-opacity": 0.55, "stroke-width": 0.7, d: lines }));
    let needles = "";
    weights.forEach((weight, i) => (needles += `M${x(i + 0.5)} ${y(0)}V${y(weight)}`));
    svg.append(shape("path", { class: "weights", "stroke-width": Math.max(0.5, ((right - left) / weights.length) * 0.7), d: needles }));
    const range = largest / tables.sigma;
    for (const tick of steps(-range, range, 6)) {
      svg.append(shape("path", { class: "axis", d: `M${left - 5} ${y(tick * tables.sigma)}h5` }));
      svg.append(shape("text", { x: left - 8, y: y(tick * tables.sigma) + 4, "text-anchor": "end" }, show(tick, 3)));
    }
    svg.append(shape("text", { class: "unit", x: 0, y: 12 }, "weight (σ)"));
    axis(svg, { low: 0, high: weights.length, x, y: bottom, width, unit: "place of the weight in its row" });
    const many = scales.length === 1 ? "one scale" : `${scales.length} scales`;
    return { height: bottom + 42, label: `Weights in their order under ${many} of ${format.name}; relative error ${percent(relative)}` };
  });

  const update = () => {
    const format = formats.get(select.value);
    const weights = currentWeights();
    find("scales-group-text").value = chosen() === weights.length ? `${chosen()}: all` : String(chosen());
    slider.setAttribute("aria-valuetext", `${chosen()} weights`);
    const rows = tables.groups.map((group) => {
      const { scales, relative } = quantize(format, weights, group);
      const cost = format.groups[group];
      const error = element("span", { "data-group": group, "data-value": relative }, percent(relative));
      return [String(group), cost.format, scales.length, cost.bits.toFixed(3), error];
    });
    fill(find("scales-table"), rows, Number(slider.value));
    redraw();
  };
  select.addEventListener("change", update);
  slider.addEventListener("input", update);
  return update;
}

numberLine();
bitToggles();
outlierFeature();
const updates = [outlierHistogram(), scaleGroups()];
const updateBoth = () => updates.forEach((update) => update());
find("outliers-size").addEventListener("input", () => {
  example.size = Number(find("outliers-size").value);
  updateBoth();
});
for (const id of ["outliers-on", "scales-outliers"]) {
  find(id).addEventListener("input", (event) => {
    switchOutliers(event.target.checked);
    updateBoth();
  });
}
updateBoth();
