// One large channel: a row of inputs rounded to 8 bits in three ways. It calls numbers.js and draw.js, and is called by
// explore.js.

// Each `group` of values over a step of its own, the largest magnitude over tables.features.largest.
function roundRow(values, group) {
  const rounded = new Float64Array(values.length);
  const steps = [];
  for (let start = 0; start < values.length; start += group) {
    const part = values.subarray(start, start + group);
    const step = part.reduce((most, value) => Math.max(most, Math.abs(value)), 0) / tables.features.largest;
    steps.push(step);
    part.forEach((value, i) => (rounded[start + i] = step > 0 ? roundEven(value / step) * step : 0));
  }
  return { rounded, steps };
}

function roundEven(value) {
  const low = Math.floor(value);
  const rest = value - low;
  if (rest !== 0.5) return Math.round(value);
  return low % 2 === 0 ? low : low + 1;
}

// The row with one channel of this magnitude, and what the ways make of it: `error` is that of the other channels.
function roundedRow(size) {
  const { channel, threshold, group } = tables.features;
  const x = Float64Array.from(tables.weights, (weight) => weight / tables.sigma);
  x[channel] = size;
  const kept = x.map((value) => Math.abs(value) >= threshold);
  const quiet = x.map((value, i) => (kept[i] ? 0 : value));
  const one = (name, values, width, sixteen) => {
    const { rounded, steps } = roundRow(values, width);
    const others = [...x.keys()].filter((i) => i !== channel);
    const result = (i) => (sixteen > 0 && kept[i] ? x[i] : rounded[i]);
    const change = Math.hypot(...others.map((i) => result(i) - x[i]));
    const used = new Set(others.filter((i) => result(i) === rounded[i]).map((i) => rounded[i] / steps[Math.floor(i / width)]));
    const usual = [...steps].sort((a, b) => a - b)[steps.length >> 1];
    return { name, step: usual, used: used.size, error: change / Math.hypot(...others.map((i) => x[i])), sixteen };
  };
  return [
    one("int8, one step", x, x.length, 0),
    one(`int8, a step for ${group}`, x, group, 0),
    one("LLM.int8()", quiet, x.length, kept.reduce((sum, is) => sum + is, 0)),
  ];
}

function outlierFeature() {
  const slider = find("features-size");
  const reach = 4;

  const redraw = picture(find("features-picture"), (svg, width) => {
    const ways = roundedRow(Number(slider.value));
    const [left, right, row] = [8, width - 8, 46];
    const x = (value) => left + ((value + reach) / (2 * reach)) * (right - left);
    ways.forEach(({ name, step }, i) => {
      const y = 20 + i * row;
      let path = "";
      for (let value = Math.ceil(-reach / step) * step; value <= reach; value += step) path += `M${x(value)} ${y}v18`;
      svg.append(shape("text", { x: left, y: y - 6 }, name));
      svg.append(shape("path", { class: "grid", "stroke-width": 0.8, d: path }));
    });
    const bottom = 12 + ways.length * row;
    axis(svg, { low: -reach, high: reach, x, y: bottom, width, unit: "value of an ordinary channel (σ)" });
    const said = ways.map(({ name, error }) => `${name} ${percent(error)}`).join(", ");
    return { height: bottom + 42, label: `Values that ordinary channels can take; their relative error: ${said}` };
  });

  const update = () => {
    find("features-size-text").value = `${slider.value} σ`;
    fill(
      find("features-table"),
      roundedRow(Number(slider.value)).map(({ name, step, used, error, sixteen }) => {
        const shown = element("span", { class: "feature-error", "data-value": error }, percent(error));
        return [name, show(step, 3), used, shown, sixteen];
      }),
    );
    redraw();
  };
  slider.addEventListener("input", update);
  update();
}
