"use strict";
const $ = (id) => document.getElementById(id);
const videos = [$("left"), $("right")];
const choices = [...document.querySelectorAll("[data-choice]")];
let voter = "";
let question = null;
let watched = 0;
let ready = false;

$("hello").addEventListener("submit", (event) => {
  event.preventDefault();
  voter = $("voter").value.trim();
  if (voter) {
    $("hello").hidden = true;
    $("pair").hidden = false;
    show();
  }
});

function enable(on) {
  ready = on;
  for (const button of [...choices, $("play"), $("swap")]) button.disabled = !on;
}

// The next pair; nothing plays before both videos can be played to their end.
async function show() {
  enable(false);
  $("state").textContent = "loading";
  const found = await (await fetch("/next?voter=" + encodeURIComponent(voter))).json();
  $("progress").textContent = `${found.done} of ${found.of}`;
  if (!found.question) {
    $("pair").hidden = true;
    $("end").hidden = false;
    return;
  }
  question = found.question;
  watched = 0;
  try {
    await Promise.all(videos.map((video, side) => load(video, found.videos[side])));
  } catch {
    $("state").textContent = "a video cannot be played by this browser";
    return;
  }
  $("state").textContent = "";
  enable(true);
  play();
}

function load(video, word) {
  return new Promise((done, failed) => {
    video.addEventListener("canplaythrough", done, { once: true });
    video.addEventListener("error", failed, { once: true });
    video.src = "/video/" + word;
    video.load();
  });
}

function play() {
  for (const video of videos) video.currentTime = 0;
  Promise.all(videos.map((video) => video.play())).catch(() => {
    $("state").textContent = "press space to play";
  });
}

// Both at one time: the right one is moved whenever it is more than two frames off.
setInterval(() => {
  const [left, right] = videos;
  if (left.paused) return;
  watched += 0.1;
  if (!right.ended && Math.abs(left.currentTime - right.currentTime) > 0.08) right.currentTime = left.currentTime;
}, 100);

function toggle() {
  const [left, right] = videos;
  if (left.ended || right.ended) play();
  else if (left.paused) videos.forEach((video) => video.play());
  else videos.forEach((video) => video.pause());
}

function swap() {
  for (const video of videos) video.muted = !video.muted;
}

async function vote(choice) {
  if (!ready) return;
  enable(false);
  const body = JSON.stringify({ question, choice, watched });
  const answer = await fetch("/vote", { method: "POST", headers: { "Content-Type": "application/json" }, body });
  if (answer.ok || answer.status === 409) show();
  else {
    $("state").textContent = "the vote could not be saved; try again";
    enable(true);
  }
}

$("play").addEventListener("click", toggle);
$("swap").addEventListener("click", swap);
for (const button of choices) button.addEventListener("click", () => vote(button.dataset.choice));
document.addEventListener("keydown", (event) => {
  if ($("pair").hidden || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const keys = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie" };
  if (event.key in keys) vote(keys[event.key]);
  else if (event.key === " ") toggle();
  else if (event.key.toLowerCase() === "s") swap();
  else return;
  event.preventDefault();
});
